"""Layer sharing: some blocks are averaged over the clients, the others stay each client's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.types import knob


@dataclass(frozen=True)
class Ptls:
    """Personalised transformer layer sharing: a client shares its less important blocks and keeps the rest.

    Paper: arXiv 2503.10217 (DropPEFT), layer sharing; by depth as in its first author's prototype, where
        the lower half is shared, by gradient as the paper describes it.
    Place: share.partial.
    Off: keep = 1 and head = "shared".
    Deviates: the paper gives no formula; importance is the sum of squared gradients of a block's trained
        parameters over the client's round. Each side of the split ranks its own blocks, so that no
        gradient norm crosses the wire. The prototype averages without weights (share.merge = uniform)
        and keeps embedding norm and classifier (head = "personal").
    """

    keep: float = knob(0.5, "fraction of the blocks that a client shares; 1.0 shares all, 0 none", low=0.0, high=1.0)
    by: str = knob(
        "depth",
        "which blocks: the first ones of the model by 'depth', or on each side those with the smaller 'gradient'",
        choices=("depth", "gradient"),
    )
    head: str = knob(
        "shared",
        "what is in no block (embedding, last norm, classifier, prompts): 'shared', or 'personal' too",
        choices=("shared", "personal"),
    )

    @property
    def uses_gradients(self) -> bool:
        """Whether the importance counts."""
        return self.by == "gradient" and 0 < self.keep < 1

    def shared(self, importance: Tensor, blocks: Sequence[int], depth: int) -> frozenset[int]:
        """Which of one side's blocks are shared.

        Args:
            importance: (n,) float64, the sum of squared gradients of each of `blocks`.
            blocks: n ascending numbers of blocks that train on this side.
            depth: number of blocks of the whole model.

        Returns:
            Their numbers; of equally important blocks the lower ones.
        """
        if self.by == "depth":
            first = round(self.keep * depth)
            return frozenset(number for number in blocks if number < first)
        order = torch.argsort(importance, stable=True)[: round(self.keep * len(blocks))]
        return frozenset(blocks[place] for place in order.tolist())
