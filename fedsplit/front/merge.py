"""Fewer activations: patch tokens of a neighbourhood are sent as their mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsplit.front.guard import Guard, patch_grid, put
from fedsplit.types import Cut, FedsplitError, knob


@dataclass(frozen=True)
class Merge:
    """Sends the mean of every `window` x `window` patch tokens, so that 1 / window^2 of them cross the wire.

    Bytes at the cut and the body's compute shrink as much, and what tells a patch from its neighbours stays at the
    client. Prefix tokens and prompts are sent as they are. Position embeddings were added before.

    Paper: none for a mean at a fixed cut; token merging as such is arXiv 2210.09461 (ToMe), which merges alike
        tokens in every block.
    Place: front.edits.
    Off: window = 1.
    Deviates: ToMe chooses pairs by their similarity, anew for every image; windows are fixed here, so that the number
        and the order of tokens say nothing of the image.
    """

    window: int = knob(2, "side of the square of patch tokens that are sent as one; 1 is off", low=1)

    def edit(self, vit: nn.Module, cut: Cut, key: int) -> nn.Module:
        """`vit` with the means at the end of the front.

        Raises:
            FedsplitError: nothing crosses this cut, or windows do not tile the patches.
        """
        if self.window == 1:
            return vit
        high, wide = patch_grid(vit)
        if high % self.window or wide % self.window:
            raise FedsplitError(
                f"front.merge.window={self.window} does not tile the {high} x {wide} patch tokens that are sent; "
                "give a divisor of both."
            )
        model: Any = put(vit, cut, "merge", Mean((high, wide), self.window))
        model.sent_grid = (high // self.window, wide // self.window)
        return vit


class Mean(Guard):
    """Tokens (B, N, C) with a `grid` of patches last to those with means in their place."""

    def __init__(self, grid: tuple[int, int], window: int) -> None:
        super().__init__()
        self.grid, self.window = grid, window
        patches = grid[0] * grid[1]
        self.adds = patches // window**2 - patches

    def act(self, x: Tensor) -> Tensor:
        """`x` (B, N, C) as (B, N + adds, C)."""
        first = x.shape[1] - self.grid[0] * self.grid[1]
        patches = x[:, first:].transpose(1, 2).unflatten(2, self.grid)
        means = F.avg_pool2d(patches, self.window).flatten(2).transpose(1, 2)
        return torch.cat([x[:, :first], means], dim=1).contiguous()
