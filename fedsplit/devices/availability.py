"""When devices are there to be sampled: at the virtual time at which a round would begin."""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedsplit.rng import key as stream
from fedsplit.rng import numpy_rng
from fedsplit.types import FedsplitError, knob

Mask = npt.NDArray[np.bool_]

DAY_S = 86400.0
GRAIN_S = 1e-6  # below this, two virtual times are one: sums of seconds are not exact


class Availability(Protocol):
    """Says which devices are there at a virtual time, and when that may change next."""

    def available(self, devices: int, time_s: float, key: int) -> Mask:
        """Which (devices,) are there at `time_s`; random draws come from the stream `key`."""

    def changes_s(self, time_s: float) -> float:
        """The next virtual time, after `time_s`, at which `available` may say something else."""


@dataclass(frozen=True)
class Always:
    """Every device is there at any time.

    Paper: none.
    Place: devices.availability.
    Off: this is it.
    Deviates: nothing to deviate from.
    """

    def available(self, devices: int, time_s: float, key: int) -> Mask:
        """All of them."""
        return np.ones(devices, dtype=bool)

    def changes_s(self, time_s: float) -> float:
        """Never."""
        return math.inf


@dataclass(frozen=True)
class Random:
    """A device is there with the same probability in every period, independently of the others.

    Paper: none; the usual model of partial participation.
    Place: devices.availability.
    Off: probability = 1.
    Deviates: nothing to deviate from.
    """

    probability: float = knob(0.7, "probability that a device is there in a period", above=0.0, high=1.0)
    period_s: float = knob(3600.0, "virtual seconds for which a draw holds", above=0.0)

    def available(self, devices: int, time_s: float, key: int) -> Mask:
        """Those whose draw of this period falls below the probability."""
        draws = numpy_rng(stream(key, "period", _slot(time_s, self.period_s))).random(devices)
        return np.asarray(draws < self.probability)

    def changes_s(self, time_s: float) -> float:
        """The end of the period."""
        return (_slot(time_s, self.period_s) + 1) * self.period_s


@dataclass(frozen=True)
class Diurnal:
    """The probability that a device is there follows a sine of the time of day, each device in a time zone of its own.

    Paper: none; availability by the hour as in arXiv 1902.01046, section 9, and arXiv 2102.08503.
    Place: devices.availability.
    Off: low = high = 1.
    Deviates: a sine, where real fleets have a sharp rise at night; zones are drawn uniformly over the day.
    """

    low: float = knob(0.1, "probability at the worst time of a device's day", low=0.0, high=1.0)
    high: float = knob(0.9, "probability at the best time of a device's day", above=0.0, high=1.0)
    zones: float = knob(1.0, "share of a day over which time zones spread; 0 is one zone", low=0.0, high=1.0)
    period_s: float = knob(3600.0, "virtual seconds for which a draw holds", above=0.0)

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise FedsplitError(f"low={self.low:g} is above high={self.high:g}; swap them.")

    def available(self, devices: int, time_s: float, key: int) -> Mask:
        """Those whose draw of this period falls below their probability at its beginning."""
        slot = _slot(time_s, self.period_s)
        zones = self.zones * numpy_rng(stream(key, "zones")).random(devices)
        day = np.sin(2 * math.pi * (slot * self.period_s / DAY_S + zones))
        chance = self.low + (self.high - self.low) * (1 + day) / 2
        return np.asarray(numpy_rng(stream(key, "period", slot)).random(devices) < chance)

    def changes_s(self, time_s: float) -> float:
        """The end of the period."""
        return (_slot(time_s, self.period_s) + 1) * self.period_s


@dataclass(frozen=True)
class Trace:
    """Times at which devices were there, from a CSV file with the columns device, from_s, to_s.

    A device may have several rows. The trace begins anew after its last `to_s`. The devices of a run take the
    traced ones in the order of their numbers, and from the first again where the run has more.

    Paper: none; for traces as in arXiv 2006.06983 or arXiv 2105.11367.
    Place: devices.availability.
    Off: not named.
    Deviates: a file of intervals, not of the phones' own events.
    """

    file: str = knob("", "CSV file with columns device, from_s, to_s (virtual seconds); wraps after the last to_s")

    def available(self, devices: int, time_s: float, key: int) -> Mask:
        """Those with an interval around `time_s`."""
        traced, _, span = _trace(self.file)
        now = time_s % span + GRAIN_S
        there = [any(start <= now < end for start, end in spans) for spans in traced]
        return np.array([there[device % len(there)] for device in range(devices)], dtype=bool)

    def changes_s(self, time_s: float) -> float:
        """The next beginning or end of an interval."""
        _, edges, span = _trace(self.file)
        now = time_s % span
        place = bisect_right(edges, now + GRAIN_S)
        return time_s - now + (edges[place] if place < len(edges) else span + edges[0])


def _slot(time_s: float, period_s: float) -> int:
    return math.floor((time_s + GRAIN_S) / period_s)


@lru_cache(maxsize=4)
def _trace(file: str) -> tuple[Sequence[Sequence[tuple[float, float]]], Sequence[float], float]:
    """Intervals by traced device, all their edges in order, and the length of the trace in seconds."""
    if not file:
        raise FedsplitError("devices.availability=trace needs a file: set devices.trace.file.")
    found: dict[int, list[tuple[float, float]]] = {}
    try:
        with Path(file).expanduser().open(newline="", encoding="utf-8") as source:
            for row in csv.DictReader(source):
                device, span = _row(row, file)
                found.setdefault(device, []).append(span)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FedsplitError(f"Cannot read the trace {file}: {getattr(error, 'strerror', None) or error}.") from None
    if not found:
        raise FedsplitError(f"The trace {file} has no rows; it needs the columns device, from_s, to_s.")
    edges = sorted({edge for spans in found.values() for span in spans for edge in span})
    return [found[device] for device in sorted(found)], edges, edges[-1]


def _row(row: Mapping[str, str | None], file: str) -> tuple[int, tuple[float, float]]:
    try:
        device, start, end = int(row["device"] or ""), float(row["from_s"] or ""), float(row["to_s"] or "")
    except (KeyError, ValueError):
        raise FedsplitError(
            f"The trace {file} needs the columns device, from_s, to_s, with numbers in every row."
        ) from None
    if not 0 <= start < end < math.inf:
        raise FedsplitError(f"The trace {file}: device {device} is there from {start:g} to {end:g}; swap them.")
    return device, (start, end)
