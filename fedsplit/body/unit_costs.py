"""What the units of a model cost in a client's round, and what the workers that hold them may spend."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
from torch import Tensor

from fedsplit.body.ask import Ask
from fedsplit.body.counting import Floats, Ints
from fedsplit.types import FedsplitError


class Costs:
    """An ask's costs in whole numbers, of its N items: units or blocks, in the order (block, unit).

    `by` says what is counted, "compute" or "communication", `units` what an item is, "head" or "block".
    Items are dealt to so many `workers`, 0 is one each, which have the budgets `shares`, dealt in turn.

    `full`, `forward` and `whole` (N,) are per sample, `whole` the share of an item in a block all in full.
    Their unit is FLOPs over the units of a block, so that shares are whole.

    With adapters a block costs something however many of its units run. Either every unit is charged as if
    alone, or that much, `entry` (N,), is set aside for all blocks beforehand: whichever buys more. Both are
    upper bounds.

    Raises:
        FedsplitError: more workers than items.
    """

    def __init__(self, ask: Ask, *, by: str, units: str, workers: int, shares: Sequence[Fraction]) -> None:
        self.sizes: Ints = ask.sizes.numpy().astype(np.int64)
        self.blocks, self.per_block = len(ask.blocks), 1 if units == "block" else ask.units
        self.items = self.blocks * self.per_block
        numbers = list(ask.blocks)
        if by == "communication":
            full, forward, whole = (np.full(self.blocks, cost, dtype=np.int64) for cost in (2, 1, 2))
            together = forward
        else:
            whole = ask.whole_flops[numbers].numpy().astype(np.int64)
            costs = (flops[numbers].numpy().astype(np.int64) for flops in (ask.full_flops, ask.forward_flops))
            full, forward = (cost * ask.units for cost in costs)
            full, together = np.maximum(full, whole), np.minimum(forward, whole)
            if units == "block":
                full, forward = whole, together
        entry = np.zeros_like(full)
        self.shares = list(shares)
        if by == "compute" and self.per_block > 1:
            more = -((full // ask.units - whole) // (ask.units - 1)) * ask.units  # of one more unit, rounded up
            aside = full - more
            least = float(min(self.shares)) * whole.sum()
            if (aside >= 0).all() and (least - aside.sum() / ask.units) / more.sum() > least / full.sum():
                full, entry = more, aside // ask.units
        self.entry: Ints = np.repeat(entry, self.per_block)
        self.together: Ints = together  # a unit's share of a block that runs forward only
        self.full, self.forward, self.whole = (np.repeat(c, self.per_block) for c in (full, forward, whole))
        if workers > self.items and self.items:
            raise FedsplitError(
                f"{workers} workers are more than the {self.items} {units}s that the body plans; "
                f"lower body.knapsack.workers to {self.items}, or to 0 for one each."
            )
        dealt = np.array_split(np.arange(self.items), workers or self.items) if self.items else []
        self.dealt: list[tuple[int, Ints]] = list(enumerate(dealt))
        self.shares = self.shares[: max(1, len(self.dealt))]

    def whole_of(self, units: Ints, rows: int | None = None) -> int:
        """What items `units` cost all in full, in the first `rows` micro-batches."""
        return int(self.whole[units].sum()) * int(self.sizes[:rows].sum())

    def capacity(self, worker: int, first: int = 0) -> int:
        """What a worker may spend in the round, after what is set aside for micro-batches from `first` on."""
        units = self.dealt[worker][1]
        aside = int(self.entry[units].sum()) * int(self.sizes[first:].sum())
        return max(0, math.floor(self.shares[worker % len(self.shares)] * self.whole_of(units)) - aside)

    @property
    def rows_in_full(self) -> int:
        """How many first micro-batches fit in full into every worker's capacity."""
        spent = self.sizes.cumsum().tolist()
        return sum(row <= math.floor(min(self.shares) * spent[-1]) for row in spent)

    def groups(self) -> Iterator[list[int]]:
        """The workers that have to choose, grouped by what their items cost."""
        groups: dict[bytes, list[int]] = {}
        for worker, units in self.dealt:
            if self.shares[worker % len(self.shares)] < 1:
                groups.setdefault(np.stack([self.full[units], self.forward[units]]).tobytes(), []).append(worker)
        yield from groups.values()

    def of(self, ops: Tensor) -> Floats:
        """What the items cost per micro-batch, (M, N), under `ops` (M, blocks, U); less where a block runs alike."""
        units = ops.shape[2]
        charged = np.stack([np.zeros_like(self.full), self.forward, self.full]) + self.entry
        alone = charged.reshape(3, self.blocks, -1)[:, :, 0]
        alike = np.stack([np.zeros_like(self.together), self.together, self.whole.reshape(self.blocks, -1)[:, 0]])
        table, blocks = ops.numpy(), np.arange(self.blocks)[:, None]
        same = (table == table[:, :, :1]).all(axis=2, keepdims=True)
        costs: Floats = np.where(same, alike[table, blocks], alone[table, blocks]).astype(np.float64)
        items: Floats = costs.mean(axis=2) if self.per_block != units else costs.reshape(len(table), -1)
        return items * self.sizes[:, None]
