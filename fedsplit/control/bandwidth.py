"""How much of its update a device sends: by how fast it sends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fedsplit.control.facts import Facts
from fedsplit.control.told import rows_of, scatter, told
from fedsplit.types import FedsplitError, Scalar, knob

KEEP = "wire.topk.keep"


@dataclass(frozen=True)
class Bandwidth:
    """Lets a client send as much of its update as it sends in the time of the fastest uplink of the round.

    The fastest drops the share `low` of its values; one whose uplink is f times as fast keeps f times as many, and
    drops at most `high`: `wire.topk.keep` is the rest.

    Paper: in the manner of FlexCom (arXiv 2012.11804), which fits the compression of each device to its means of
        computing and sending; a baseline of Caesar (arXiv 2412.19989), whose bounds these are.
    Place: control.tune.
    Off: low = high = 0.
    Deviates: FlexCom minimises energy under a bound of convergence; this equalises seconds of sending, and nothing
        else of the two is the same.
    """

    low: float = knob(0.1, "share of an update that the fastest uplink drops", low=0.0, high=1.0)
    high: float = knob(0.6, "largest share of an update that is dropped", low=0.0, high=1.0)

    keys: ClassVar[tuple[str, ...]] = (KEEP,)
    columns: ClassVar[tuple[str, ...]] = ("round", "client", "uplink", "keep")
    timed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise FedsplitError(f"low={self.low:g} is more than high={self.high:g}; low drops less.")

    @property
    def choices(self) -> tuple[dict[str, Scalar], ...]:
        """The ends of what it may choose."""
        return {KEEP: 1 - self.high}, {KEEP: 1 - self.low}

    def assign(
        self, facts: Facts, memory: Mapping[str, Any], key: int
    ) -> tuple[dict[int, dict[str, Scalar]], dict[str, Any]]:
        """The value of `keys` for every client of the round, and new memory."""
        seconds = {client: facts.devices[client].upload_s(1.0) for client in facts.clients}
        least = min(seconds.values())
        speed = {client: least / spent if spent else 1.0 for client, spent in seconds.items()}
        keep = {client: max(1 - self.high, (1 - self.low) * share) for client, share in speed.items()}
        rows = [{"client": client, "uplink": speed[client], "keep": value} for client, value in keep.items()]
        return {client: {KEEP: value} for client, value in keep.items()}, told(memory, facts.round, rows)

    def rows(self, memory: Mapping[str, Any], round: int) -> list[dict[str, Any]]:
        """What choices.csv says of round `round`, one row a client."""
        return rows_of(memory, round)

    def draw(self, rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
        """Plot the kept share of every client over rounds; returns `path`."""
        return scatter(rows, "keep", "update's values sent (fraction)", path)
