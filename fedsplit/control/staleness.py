"""How coarse a download may be: by how long ago the device held the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fedsplit.control.facts import Facts
from fedsplit.control.told import rows_of, scatter, told
from fedsplit.types import Scalar, knob

KEEP = "wire.recover.keep"


@dataclass(frozen=True)
class Staleness:
    """Sends less of the model exactly to a device that took part lately, and all of it to a newcomer.

    With r the last round in which it took part (0 if never), round t sends the share theta = (1 - (t - r) / t) high
    of the values as one bit, which the device recovers from its old copy: `wire.recover.keep` = 1 - theta.

    Paper: arXiv 2412.19989 (Caesar), its download ratio, in the words of our card (step 1): public text and a
        re-implementation; `high` is the upper end of the range in its section 5.1.
    Place: control.tune.
    Off: high = 0.
    Deviates: the round counts whose update the server let in; the ratio starts at 0 for a newcomer, not at 0.1.
    """

    high: float = knob(0.6, "largest share of a model's values that is sent as one bit", low=0.0, high=1.0)

    keys: ClassVar[tuple[str, ...]] = (KEEP,)
    columns: ClassVar[tuple[str, ...]] = ("round", "client", "last", "keep")

    @property
    def choices(self) -> tuple[dict[str, Scalar], ...]:
        """The ends of what it may choose."""
        return {KEEP: 1 - self.high}, {KEEP: 1.0}

    def assign(
        self, facts: Facts, memory: Mapping[str, Any], key: int
    ) -> tuple[dict[int, dict[str, Scalar]], dict[str, Any]]:
        """The value of `keys` for every client of the round, and new memory."""
        keep = {client: 1 - self.ratio(facts.round, facts.last[client]) for client in facts.clients}
        rows = [{"client": client, "last": facts.last[client], "keep": value} for client, value in keep.items()]
        return {client: {KEEP: value} for client, value in keep.items()}, told(memory, facts.round, rows)

    def ratio(self, round: int, last: int) -> float:
        """The share that is sent as one bit in round `round` to a device that last took part in round `last`."""
        return (1 - (round - last) / round) * self.high

    def rows(self, memory: Mapping[str, Any], round: int) -> list[dict[str, Any]]:
        """What choices.csv says of round `round`, one row a client."""
        return rows_of(memory, round)

    def draw(self, rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
        """Plot the exact share of every client over rounds; returns `path`."""
        return scatter(rows, "keep", "model's values sent exactly (fraction)", path)
