"""The virtual clock: seconds and joules of a round from FLOPs and bytes that were really counted."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedsplit.devices.profiles import Profile
from fedsplit.types import Report


@dataclass(frozen=True)
class Cost:
    """What a client's round costs: `seconds` until its update is in, `joules` at the device.

    The phases follow one another: all of what it receives, computes and sends, the latency of its messages, the
    server's work for it and the queue before that; then it is idle until the round ends. It begins `begins_s` after
    the first of the round does.
    """

    seconds: float = 0.0
    joules: float = 0.0
    download_s: float = 0.0
    compute_s: float = 0.0
    upload_s: float = 0.0
    latency_s: float = 0.0
    server_s: float = 0.0
    queue_s: float = 0.0
    idle_s: float = 0.0
    begins_s: float = 0.0

    @property
    def active_s(self) -> float:
        """Seconds in which the device computes or transmits."""
        return self.compute_s + self.upload_s + self.download_s


PHASES = ("download_s", "compute_s", "upload_s", "latency_s", "server_s", "queue_s", "idle_s")


@dataclass(frozen=True)
class Visits:
    """A client's round as the server's queue sees it.

    `first_s` of its own, then `count` visits of `serve_s` each, with `between_s` of its own between two of them.
    """

    first_s: float
    between_s: float
    serve_s: float
    count: int


def cost(report: Report, profile: Profile, server_flops_per_s: float = 0.0) -> Cost:
    """Time and energy of one client's round where nobody else keeps the server busy, up to its update.

    The device idles while the server computes. A rate of 0 is infinite.
    """
    up, down = (_bytes(report, way) for way in ("-up", "-down"))
    alone = Cost(
        download_s=profile.download_s(down),
        compute_s=profile.compute_s(report.client_flops, report.client_infer_flops),
        upload_s=profile.upload_s(up),
        latency_s=report.messages * profile.latency_s,
        server_s=report.server_flops / server_flops_per_s if server_flops_per_s else 0.0,
    )
    seconds = alone.active_s + (alone.server_s + alone.latency_s)
    return until(replace(alone, seconds=seconds), profile, seconds)


def until(cost: Cost, profile: Profile, end_s: float) -> Cost:
    """`cost` with the wait until the round ends, `end_s` after it began, and the energy of it all."""
    idle_s = max(0.0, end_s - cost.seconds)
    waiting_s = cost.latency_s + cost.server_s + cost.queue_s + idle_s
    return replace(cost, idle_s=idle_s, joules=cost.active_s * profile.active_w + waiting_s * profile.idle_w)


def part(cost: Cost, profile: Profile, fraction: float) -> Cost:
    """What a client has cost that gets no further than `fraction` of its round; every phase in proportion."""
    phases = {name: getattr(cost, name) * fraction for name in PHASES} | {"idle_s": 0.0}
    seconds = cost.seconds * fraction
    return until(replace(cost, seconds=seconds, **phases), profile, seconds)


def part_of(report: Report, fraction: float) -> Report:
    """What a client has counted that gets no further than `fraction` of its round, rounded down."""
    names = ("messages", "client_flops", "client_infer_flops", "local_flops", "local_infer_flops", "server_flops")
    sent = {stream: int(count * fraction) for stream, count in report.bytes.items()}
    raw = {stream: int(count * fraction) for stream, count in report.raw_bytes.items()}
    counts: dict[str, Any] = {name: int(getattr(report, name) * fraction) for name in names}
    return Report(steps=int(report.steps * fraction), bytes=sent, raw_bytes=raw, **counts)


def visits(report: Report, cost: Cost, profile: Profile) -> Visits:
    """The client's visits at the server; the totals of its split steps are divided evenly over them.

    A step has two where gradients go up (the body waits for the loss), else one; the client's first and last
    share of its own time are half as long as those between two visits.
    """
    each = sum(report.bytes.get(stream, 0) > 0 for stream in ("activations-up", "gradients-up"))
    count = report.steps * each
    if not count:
        return Visits(cost.seconds, 0.0, 0.0, 0)
    before = (
        profile.download_s(report.bytes.get("parameters-down", 0))
        + profile.compute_s(report.local_flops, report.local_infer_flops)
        + profile.latency_s
    )
    after = profile.upload_s(report.bytes.get("parameters-up", 0)) + profile.latency_s
    own = max(0.0, cost.active_s + cost.latency_s - before - after)
    return Visits(before + own / count / 2, own / count, cost.server_s / count, count)


def queues(clients: Mapping[int, Visits], workers: int) -> dict[int, float]:
    """Seconds that each client waits in all until one of `workers` server workers is free; 0 workers are unlimited.

    Whoever arrives first is served first; of two at the same time, the lower client id.
    """
    waits = dict.fromkeys(clients, 0.0)
    if not workers:
        return waits
    left = {client: visits.count for client, visits in clients.items()}
    arrivals = [(visits.first_s, client) for client, visits in clients.items() if visits.count and visits.serve_s]
    free = [0.0] * workers
    heapq.heapify(arrivals)
    while arrivals:
        arrived, client = heapq.heappop(arrivals)
        begins = max(arrived, heapq.heappop(free))
        done = begins + clients[client].serve_s
        heapq.heappush(free, done)
        waits[client] += begins - arrived
        left[client] -= 1
        if left[client]:
            heapq.heappush(arrivals, (done + clients[client].between_s, client))
    return waits


def _bytes(report: Report, way: str) -> int:
    return sum(count for stream, count in report.bytes.items() if stream.endswith(way))
