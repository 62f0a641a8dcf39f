"""Patch tokens in a random order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsplit.front.guard import Guard, patch_grid, put
from fedsplit.types import Cut, knob


@dataclass(frozen=True)
class Shuffle:
    """Permutes a sample's patch tokens at random, each sample by itself, anew for every upload.

    Prefix tokens and prompts stay where they are. The position embedding was added before, so a token still says
    where it came from, and an attacker who knows the front sorts them (`audit.attacks = "inverse-net"` does).
    Blocks and attention pooling commute with a permutation of their tokens: class tokens, and the mean of the
    patches, stay what they were up to the rounding of sums in another order. No model that fedsplit cuts has a
    later consumer of the order (relative and rotary positions are refused by `model.name`), so none is refused here.

    Paper: Yao et al., Privacy-preserving split learning via patch shuffling over transformers, ICDM 2022.
    Place: front.edits.
    Off: fraction = 0.
    Deviates: tokens are permuted at the cut, after any blocks of the client, and only within their sample. The
        order never crosses the wire.
    """

    fraction: float = knob(1.0, "fraction of the patch tokens that change places; 0 is off", low=0.0, high=1.0)

    def edit(self, vit: nn.Module, cut: Cut, key: int) -> nn.Module:
        """`vit` with the permutation at the end of the front; in evaluation it is drawn from stream `key`.

        Raises:
            FedsplitError: nothing crosses this cut.
        """
        high, wide = patch_grid(vit)
        return put(vit, cut, "shuffle", Permute(self.fraction, high * wide, key)) if self.fraction else vit


class Permute(Guard):
    """Tokens (B, N, C) whose last `patches` are in another order."""

    draws = True

    def __init__(self, fraction: float, patches: int, stream: int) -> None:
        super().__init__(stream)
        self.patches = patches
        self.count = round(fraction * patches)

    def act(self, x: Tensor) -> Tensor:
        """`x` (B, N, C) with its patches permuted."""
        first = x.shape[1] - self.patches
        chosen = torch.rand(len(x), self.patches, generator=self.source).argsort(1)[:, : self.count]
        order = torch.arange(self.patches).repeat(len(x), 1).scatter(1, chosen.sort(1).values, chosen)
        places = (order + first).to(x.device)[:, :, None].expand(-1, -1, x.shape[2])
        return torch.cat([x[:, :first], x.gather(1, places)], dim=1)
