"""How fast features move with the image, as a term of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fedsplit import rng
from fedsplit.front.vit import Part
from fedsplit.types import knob

_EPS = 1e-8


@dataclass(frozen=True)
class Lipschitz:
    """Adds alpha times the sum of the front's local Lipschitz values, block by block, at images with Gaussian noise.

    With z_i the tokens behind block i and D z_i what noise D x on the pixels changes of them, k_1 = |D z_1| / |D x|
    and k_i = |D z_i| / |D z_(i-1)|, in L2 norms over all tokens. The embedding alone, with any prompts at the input,
    is block 1, so that a front without blocks has a term too. Guards and prompts at the cut are left out.

    Features are first divided by their spread: the root mean square of z_i about its mean over the batch. Else k
    falls by rescaling what the next norm scales back, or by a large constant, and nothing is won: an attacker
    removes both. The spread has its gradient, so that no step is taken in the direction of the scale either.

    Paper: arXiv 2307.10981 (PATROL), the regularisation L_lip.
    Place: front.penalties.
    Off: alpha = 0.
    Deviates: the spread; one alpha for all blocks; the supremum over x is that of the mini-batch and its draws, or
        their mean. Both passes of a draw run without plans and with the same dropout. A batch of one sample has
        no spread, and no term. The account of FLOPs leaves the 1 + draws passes out.
    """

    alpha: float = knob(0.01, "weight of every block's value; 0 is off", low=0.0)
    sigma: float = knob(0.05, "standard deviation of the noise, in normalised pixel units", above=0.0)
    draws: int = knob(1, "draws of the noise in a step, a pass through the front each", low=1)
    over: str = knob("max", "of a mini-batch's values the 'max' or the 'mean'", choices=("max", "mean"))

    def penalty(self, front: Part, x: Tensor, h: Tensor, memory: Any, key: int) -> tuple[Tensor, Any]:
        """The term for images `x` (B, 3, height, width), noise from stream `key`; it has no memory."""
        if not self.alpha or not h.requires_grad or len(x) < 2:
            return h.new_zeros(()), memory
        shared = rng.key(key, "dropout")
        still = list(front.stages(x, shared))
        spreads = [(z - z.mean(0)).square().mean().clamp(min=_EPS**2).sqrt() for z in still]
        found = []
        for draw in range(self.draws):
            noise = torch.randn(x.shape, generator=rng.torch_rng(rng.key(key, "delta", draw))) * self.sigma
            delta = noise.to(x.device, x.dtype)
            moved = front.stages(x + delta, shared)
            changes = [(m - z) / (s + _EPS) for m, z, s in zip(moved, still, spreads, strict=True)]
            norms = [torch.linalg.vector_norm(change.flatten(1), dim=1) for change in (delta, *changes)]
            found.append(torch.stack([after / (before + _EPS) for before, after in pairwise(norms)]))
        values = torch.cat(found, dim=1)  # (blocks, draws * B)
        block = values.amax(1) if self.over == "max" else values.mean(1)
        return self.alpha * block.sum(), memory
