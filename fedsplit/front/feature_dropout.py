"""Dropout of the activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsplit.front.guard import Guard, put
from fedsplit.types import Cut, knob


@dataclass(frozen=True)
class FeatureDropout:
    """Sends zeros for a random fraction of all entries, drawn anew for every upload, in evaluation too.

    Paper: He, Zhang and Lee, IEEE Internet of Things Journal, 2020: dropout of the intermediate activations.
    Place: front.edits.
    Off: keep = 1.0.
    Deviates: each entry is kept by itself, and divided by keep, so that its expectation stays. The bytes do
        not shrink: zeros are sent as they are. Their positions leak nothing, since they are drawn at random.
    """

    keep: float = knob(0.8, "fraction of the entries that is sent; 1.0 is off", above=0.0, high=1.0)

    def edit(self, vit: nn.Module, cut: Cut, key: int) -> nn.Module:
        """`vit` with the dropout at the end of the front; in evaluation it is drawn from stream `key`.

        Raises:
            FedsplitError: nothing crosses this cut.
        """
        return put(vit, cut, "feature-dropout", Drop(self.keep, key)) if self.keep < 1 else vit


class Drop(Guard):
    """Tokens (B, N, C) with zeros among their entries."""

    draws = True

    def __init__(self, keep: float, stream: int) -> None:
        super().__init__(stream)
        self.keep = keep

    def act(self, x: Tensor) -> Tensor:
        """`x` (B, N, C), each entry 0 or divided by `keep`."""
        mask = torch.rand(x.shape, generator=self.source) < self.keep
        return x * (mask.to(x.device, x.dtype) / self.keep)
