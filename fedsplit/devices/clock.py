"""The virtual clock: seconds and joules of a round from FLOPs and bytes that were really counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsplit.settings import Devices
from fedsplit.types import Report


@dataclass(frozen=True)
class Cost:
    """What a client's round costs: `seconds` until its update is in, `joules` at the device."""

    seconds: float
    joules: float


def cost(report: Report, profile: Devices) -> Cost:
    """Time and energy of one client's round: its phases follow one another.

    The device idles while the server computes. A rate of 0 in `profile` is infinite.
    """
    up = sum(count for stream, count in report.bytes.items() if stream.endswith("-up"))
    down = sum(count for stream, count in report.bytes.items() if stream.endswith("-down"))
    active = (
        _ratio(report.client_flops, profile.flops_per_s)
        + _ratio(up, profile.up_bytes_per_s)
        + _ratio(down, profile.down_bytes_per_s)
    )
    waiting = _ratio(report.server_flops, profile.server_flops_per_s) + report.messages * profile.latency_s
    return Cost(active + waiting, active * profile.active_w)


def round_cost(costs: Sequence[Cost], *, parallel: bool) -> Cost:
    """A round of several clients: in parallel it lasts as long as the slowest, in turn as all together."""
    seconds = [cost.seconds for cost in costs] or [0.0]
    return Cost(max(seconds) if parallel else sum(seconds), sum(cost.joules for cost in costs))


def _ratio(amount: float, rate: float) -> float:
    return amount / rate if rate else 0.0
