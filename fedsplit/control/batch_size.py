"""How many samples a step takes: so that the clients of a round are done together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fedsplit.control.facts import Facts
from fedsplit.control.told import rows_of, scatter, told
from fedsplit.types import FedsplitError, Scalar, knob

BATCH = "local.batch-size"


@dataclass(frozen=True)
class BatchSize:
    """Gives the fastest client of a round the largest batches, and the others as many samples as take that long.

    A round of `local.max-steps` = tau steps with b samples takes M(b) = fixed + tau b s seconds: `fixed` are the
    transfers of the model, coded as the other controllers chose, the local phase and latency; s are the seconds a
    sample takes at the device, on the wire (activations and gradients) and at the server. The fastest of the
    clients, l, gets b = high; the others floor((M_l(high) - fixed) / (tau s)) within [low, high].

    Paper: arXiv 2412.19989 (Caesar), whose idea is public and whose formulas are not: those of our card (step 7).
        With over = step nothing of a round but its steps counts, as in the regulation of MergeSFL
        (arXiv 2311.13348).
    Place: control.tune.
    Off: low = high = local.batch-size.
    Deviates: s has the activations and gradients of a split in it, and the server's time without a queue; a device
        with fewer samples than b, or epochs that end before tau steps, is done sooner than M says.
    """

    low: int = knob(1, "smallest batch", low=1)
    high: int = knob(32, "largest batch, that of the fastest client", low=1)
    over: str = knob(
        "round", "what is to take equally long: the whole 'round', or its 'step's alone", choices=("round", "step")
    )

    keys: ClassVar[tuple[str, ...]] = (BATCH,)
    columns: ClassVar[tuple[str, ...]] = ("round", "client", "batch", "predicted_s")
    timed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise FedsplitError(f"low={self.low} is more than high={self.high}.")

    @property
    def choices(self) -> tuple[dict[str, Scalar], ...]:
        """The ends of what it may choose."""
        return {BATCH: self.low}, {BATCH: self.high}

    def assign(
        self, facts: Facts, memory: Mapping[str, Any], key: int
    ) -> tuple[dict[int, dict[str, Scalar]], dict[str, Any]]:
        """The value of `keys` for every client of the round, and new memory."""
        fixed = {client: self._fixed_s(facts, client) for client in facts.clients}
        each = {client: facts.steps * facts.sample_s(client) for client in facts.clients}
        fastest = min(facts.clients, key=lambda client: (fixed[client] + each[client] * self.high, client))
        target = fixed[fastest] + each[fastest] * self.high
        sizes = {client: self.size(target - fixed[client], each[client]) for client in facts.clients}
        sizes[fastest] = self.high
        rows = [
            {"client": client, "batch": size, "predicted_s": fixed[client] + each[client] * size}
            for client, size in sizes.items()
        ]
        return {client: {BATCH: size} for client, size in sizes.items()}, told(memory, facts.round, rows)

    def size(self, left_s: float, each_s: float) -> int:
        """The batch of a client that has `left_s` seconds for its steps, of which a sample in each takes `each_s`."""
        if not each_s:
            return self.high
        # A whole number may come out of the division a little too small.
        return min(self.high, max(self.low, math.floor(left_s / each_s + 1e-9)))

    def rows(self, memory: Mapping[str, Any], round: int) -> list[dict[str, Any]]:
        """What choices.csv says of round `round`, one row a client."""
        return rows_of(memory, round)

    def draw(self, rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
        """Plot the batch of every client over rounds; returns `path`."""
        return scatter(rows, "batch", "samples a step", path)

    def _fixed_s(self, facts: Facts, client: int) -> float:
        return facts.overhead_s(client) + facts.transfer_s(client) if self.over == "round" else 0.0
