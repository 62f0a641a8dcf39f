"""The best linear attacker, solved anew in every step, whose success is a term of the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsplit.attacks.patches import to_patches
from fedsplit.front.vit import Part
from fedsplit.types import FedsplitError, knob

_TINY = 1e-12


@dataclass(frozen=True)
class LinearAdversary:
    """Adds weight max(0, explained - threshold), where `explained` is what a linear map tells of unseen images.

    One half of the batch fits ridge regression from patch tokens, and the mean of all tokens, to the pixels of
    their patches, each less its mean over the batch; `explained` is the fraction of the other half's squared pixels
    that the map accounts for. The gradient passes through the solution, so the front meets an attacker that is the
    best of its kind in every step. Channels are divided by their spread: rescaling wins nothing.

    Paper: arXiv 2307.10981 (PATROL), L_adv, with its inner maximum over linear attackers in closed form.
    Place: front.penalties.
    Off: weight = 0.
    Deviates: the paper trains one network beside the front. Against our fronts a trained decoder was fooled while a
        fresh linear map still found the image (docs/privacy.md). It measures nothing: what is not linear is hidden
        from it. The account of FLOPs leaves the term out.
    """

    weight: float = knob(1.0, "weight of the term; 0 is off", low=0.0)
    threshold: float = knob(0.1, "explained fraction below which it asks for no more", low=0.0, high=1.0)
    ridge: float = knob(0.001, "weight of the squared map against the mean squared error", above=0.0)

    def penalty(self, front: Part, x: Tensor, h: Tensor, memory: Any, key: int) -> tuple[Tensor, Any]:
        """The term for images `x` (B, 3, height, width) and activations `h` (B, N, C); it has no memory.

        Raises:
            FedsplitError: the patch tokens are no square grid over the image.
        """
        if not self.weight or not h.requires_grad or h.is_meta or len(x) < 4:
            return h.new_zeros(()), memory
        tokens, pixels = h[:, front.prefix :], _patches(front.pixels(x), h.shape[1] - front.prefix)
        inputs = torch.cat([tokens, h.mean(1, keepdim=True).expand_as(tokens)], 2).double()
        return self.weight * torch.relu(self.explained(inputs, pixels.double()) - self.threshold).to(h.dtype), memory

    def explained(self, inputs: Tensor, pixels: Tensor) -> Tensor:
        """The fraction of `pixels` (B, P, K) that `inputs` (B, P, J) tell in the second half, by a fit on the first."""
        half = len(inputs) // 2
        inputs, pixels = inputs - inputs.mean(0), pixels - pixels.mean(0)
        inputs = inputs / (inputs.square().mean((0, 1)) + _TINY).sqrt()
        x, y = inputs[:half].flatten(0, 1), pixels[:half].flatten(0, 1)
        damping = self.ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        weights = torch.linalg.solve(x.T @ x / len(x) + damping, x.T @ y / len(x))
        left = (pixels[half:] - inputs[half:] @ weights).square().sum()
        explained: Tensor = 1 - left / pixels[half:].square().sum().clamp(min=_TINY)
        return explained


def _patches(images: Tensor, count: int) -> Tensor:
    """Images (B, 3, height, width) as `count` square patches, (B, count, K)."""
    height, width = images.shape[2:]
    side = math.isqrt(height * width // count) if count > 0 else 0
    if not side or height % side or width % side or (height // side) * (width // side) != count:
        raise FedsplitError(
            f"front.penalties=linear-adversary needs a grid of square patches, but {count} patch tokens stand for "
            f"images of {height} x {width} pixels; take adversary instead."
        )
    return to_patches(images, side)
