"""Who takes part in a round, who is lost on the way, and how long the round lasts: all seeded, for run and plan alike.

Every client's work is really done; the virtual clock then decides whose update comes in time. So a result
does not depend on the order in which clients really finish.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedsplit.devices import clock
from fedsplit.devices.clock import Cost
from fedsplit.devices.profiles import Profile
from fedsplit.rng import numpy_rng
from fedsplit.types import FedsplitError, Report
from fedsplit.world import World

MOST_CHANGES = 10_000


@dataclass(frozen=True)
class Cohort:
    """The clients of an attempt at a round, in the order in which a serial schedule takes them.

    `wanted` updates end it, `waited_s` passed until enough devices were there.
    """

    number: int
    attempt: int
    clients: tuple[int, ...]
    wanted: int
    waited_s: float = 0.0


@dataclass(frozen=True)
class Lost:
    """A client whose update does not count: what it had counted and cost by then, at `fraction` of its round.

    `reason` says why it dropped out; it is empty for one that was only too late.
    """

    client: int
    report: Report
    cost: Cost
    fraction: float
    reason: str = ""


@dataclass(frozen=True)
class Settled:
    """How the virtual clock ends a round: costs of the clients that count, those that are lost, and the whole."""

    costs: Mapping[int, Cost]
    lost: tuple[Lost, ...]
    whole: Cost


def gather(world: World, number: int, attempt: int, clock_s: float = 0.0) -> Cohort:
    """The clients of round `number`, drawn from those that are available at virtual time `clock_s` or soon after.

    Raises:
        FedsplitError: too few devices are ever there at once.
    """
    count, devices = len(world.shards), world.config.devices
    wanted = min(devices.per_round or count, count)
    least = wanted if devices.per_round else max(1, math.ceil(world.config.share.quorum * count))
    piece, stream = world.config.piece("devices.availability"), world.key("availability")
    begins, there = clock_s, piece.available(count, clock_s, stream)
    for _ in range(MOST_CHANGES):
        if there.sum() >= least:
            break
        begins = piece.changes_s(begins)
        there = piece.available(count, begins, stream)
    else:
        raise FedsplitError(
            f"round {number}: {least} devices were not available at once until virtual second {begins:.0f}; "
            "lower devices.per-round, or make more of them available (devices.availability)."
        )
    draw = numpy_rng(world.key("sample", number, attempt)).permutation(count)
    clients = [int(client) for client in draw if there[client]]
    asked = math.ceil(wanted * devices.over_select - 1e-9)
    return Cohort(number, attempt, tuple(clients[:asked]), min(wanted, len(clients)), begins - clock_s)


def dropout(world: World, cohort: Cohort, client: int) -> float | None:
    """After which fraction of its virtual time a client drops out of the round; None if it does not."""
    draws = numpy_rng(world.key("dropout", cohort.number, cohort.attempt, client)).random(2)
    return float(draws[1]) if draws[0] < world.config.devices.dropout else None


def farewell(fraction: float) -> str:
    """Why a client that dropped out failed."""
    return f"dropped out after {100 * fraction:.0f} % of its round"


def device(world: World, cohort: Cohort, client: int) -> Profile:
    """The client's profile in this round: all rates lower if it straggles."""
    devices, profile = world.config.devices, world.fleet[client]
    if numpy_rng(world.key("straggle", cohort.number, cohort.attempt, client)).random() >= devices.straggle:
        return profile
    return profile.varied(*[1 / devices.straggle_factor] * 3)


def settle(world: World, cohort: Cohort, reports: Mapping[int, Report]) -> Settled:
    """The costs of a round of which `reports` tell, those of clients that drop out included.

    Side by side (splitfed-v1) the round ends with the last of the cohort, with the `wanted`-th update if more were
    asked for, or at the deadline; in turn it lasts as long as all of them together.
    """
    drops = {client: fraction for client in reports if (fraction := dropout(world, cohort, client)) is not None}
    told = {client: clock.part_of(report, drops.get(client, 1.0)) for client, report in reports.items()}
    profiles = {client: device(world, cohort, client) for client in reports}
    rate = world.config.devices.server_flops_per_s
    costs = {client: clock.cost(told[client], profiles[client], rate) for client in reports}
    if world.config.server.schedule != "splitfed-v1":
        lasts = 0.0
        for client in (client for client in cohort.clients if client in costs):
            costs[client] = replace(costs[client], begins_s=lasts)
            lasts += costs[client].seconds
        count = [client for client in cohort.clients if client in costs and client not in drops]
        late: dict[int, float] = {}
    else:
        ways = {client: clock.visits(told[client], costs[client], profiles[client]) for client in sorted(reports)}
        waits = clock.queues(ways, world.config.devices.server_workers)
        costs = {c: replace(cost, queue_s=waits[c], seconds=cost.seconds + waits[c]) for c, cost in costs.items()}
        count, lasts = _in_time(world, cohort, costs, drops)
        late = {c: lasts / costs[c].seconds for c in costs if c not in count and costs[c].seconds > lasts}
        costs = {c: clock.until(cost, profiles[c], lasts) for c, cost in costs.items() if c in count} | {
            c: clock.part(cost, profiles[c], late.get(c, 1.0)) for c, cost in costs.items() if c not in count
        }
    lost = []
    for client in sorted(set(costs) - set(count)):
        fraction = drops.get(client, 1.0) * late.get(client, 1.0)
        reason = farewell(drops[client]) if client in drops and client not in late else ""
        lost.append(Lost(client, clock.part_of(reports[client], fraction), costs[client], fraction, reason))
    joules = sum((costs[client].joules for client in sorted(costs)), 0.0)
    return Settled({c: costs[c] for c in sorted(count)}, tuple(lost), Cost(cohort.waited_s + lasts, joules))


def _in_time(
    world: World, cohort: Cohort, costs: Mapping[int, Cost], drops: Mapping[int, float]
) -> tuple[list[int], float]:
    """Whose updates count, and how long the round lasts; of two at the same time, the one that was drawn first."""
    done = sorted(
        (client for client in cohort.clients if client in costs and client not in drops),
        key=lambda client: costs[client].seconds,
    )
    if len(cohort.clients) > cohort.wanted and len(done) >= cohort.wanted:
        done = done[: cohort.wanted]
        lasts = costs[done[-1]].seconds
    else:
        lasts = max((cost.seconds for cost in costs.values()), default=0.0)
    limit = world.config.devices.deadline_s
    if limit and lasts > limit:
        return [client for client in done if costs[client].seconds <= limit], limit
    return done, lasts


def check(world: World) -> None:
    """Whether the fleet can be had as the config asks.

    Raises:
        FedsplitError: a profile or a trace that cannot be read, or a choice among clients that take turns.
    """
    devices = world.config.devices
    if (devices.over_select > 1 or devices.deadline_s) and world.config.server.schedule != "splitfed-v1":
        key = "devices.over-select" if devices.over_select > 1 else "devices.deadline-s"
        raise FedsplitError(
            f"{key} leaves out clients that are slower than others beside them, but with "
            f"server.schedule={world.config.server.schedule} they take turns; set server.schedule=splitfed-v1."
        )
    assert len(world.fleet) == len(world.shards)
    gather(world, 1, 0)
