"""What a plan piece is asked for: one client's round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Ask:
    """A client's round, cut into M micro-batches, before a model of L blocks with U units each.

    `sizes` (M,) int64 are the samples of each micro-batch, `blocks` the global numbers of those blocks that
    may be planned, ascending; the others run in full. Costs are FLOPs per sample, (L,) int64: `forward_flops`
    and `full_flops` at most those of one unit that runs alone in its block, forward only or in full,
    `whole_flops` of a block whose units all run in full. `scores` holds by metric what each unit contributes
    to each micro-batch, (M, L, U) float32. The first `probes` micro-batches run in full, to be scored.
    `round` counts from 1 to `rounds`.
    """

    sizes: Tensor
    blocks: tuple[int, ...]
    depth: int
    units: int
    forward_flops: Tensor
    full_flops: Tensor
    whole_flops: Tensor
    round: int = 1
    rounds: int = 1
    probes: int = 0
    scores: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def micro_batches(self) -> int:
        """M."""
        return len(self.sizes)
