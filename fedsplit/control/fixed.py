"""Schedules that are fixed before the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedsplit.types import knob


@dataclass(frozen=True)
class Constant:
    """The same value in every round.

    Paper: none.
    Place: optimizer.schedule.
    Off: is the neutral setting.
    Deviates: nothing.
    """

    def factor(self, round: int, rounds: int) -> float:
        """The multiplier of round `round` (from 1) of `rounds`."""
        return 1.0


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from 1 down to `floor` over the run.

    Paper: arXiv 1608.03983, eq. 5, without restarts.
    Place: optimizer.schedule.
    Off: floor = 1.
    Deviates: steps once a round, not once a batch.
    """

    floor: float = knob(0.0, "multiplier of the last round", low=0.0, high=1.0)

    def factor(self, round: int, rounds: int) -> float:
        """The multiplier of round `round` (from 1) of `rounds`."""
        progress = (round - 1) / max(1, rounds - 1)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))
