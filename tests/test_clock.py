"""The virtual clock: max over parallel parts, sum over serial ones, and no cost that falls where work or bytes grow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.devices.clock import PHASES, Cost, Visits, cost, part, part_of, queues, until, visits
from fedsplit.devices.profiles import FIGURES, Profile
from fedsplit.types import STREAMS, Report

COUNTS = ("client_flops", "server_flops", "messages")
SLOW = Profile(
    "slow",
    **dict.fromkeys((name for name in FIGURES if name.startswith("train_")), 100.0),
    **dict.fromkeys((name for name in FIGURES if name.startswith("infer_")), 200.0),
    down_bytes_per_s=20.0,
    up_bytes_per_s=10.0,
    latency_s=0.5,
    active_w=3.0,
    idle_w=1.0,
)
ROUND = Report(
    steps=2,
    messages=10,
    client_flops=600,
    client_infer_flops=200,
    server_flops=1000,
    bytes={"activations-up": 100, "activations-down": 50, "parameters-up": 20, "parameters-down": 50},
)
amounts = st.integers(0, 10**6)
reports = st.builds(
    lambda flops, bytes: Report(
        steps=3, client_infer_flops=flops[0] // 2, bytes=bytes, **dict(zip(COUNTS, flops, strict=True))
    ),
    st.tuples(amounts, amounts, st.integers(0, 50)),
    st.fixed_dictionaries(dict.fromkeys(STREAMS, amounts)),
)


def test_phases_follow_one_another() -> None:
    assert cost(ROUND, Profile("free")) == Cost()
    one = cost(ROUND, SLOW, 500.0)
    computing = 400 / 100 + 200 / 200
    assert (one.compute_s, one.upload_s, one.download_s) == (computing, 120 / 10, 100 / 20)
    assert (one.server_s, one.latency_s) == (1000 / 500, 10 * 0.5)
    active, waiting = computing + 120 / 10 + 100 / 20, 2 + 5
    assert one.seconds == pytest.approx(active + waiting)
    assert one.joules == pytest.approx(3 * active + 1 * waiting)
    whole = until(one, SLOW, one.seconds + 10)
    assert whole.idle_s == pytest.approx(10) and whole.joules == pytest.approx(one.joules + 10)
    assert sum(getattr(whole, name) for name in PHASES) == pytest.approx(one.seconds + 10)


def test_a_part_of_a_round_costs_its_part_and_counts_are_rounded_down() -> None:
    half = part(cost(ROUND, SLOW, 500.0), SLOW, 0.5)
    assert half.seconds == pytest.approx(cost(ROUND, SLOW, 500.0).seconds / 2)
    assert half.joules == pytest.approx(cost(ROUND, SLOW, 500.0).joules / 2)
    third = part_of(ROUND, 1 / 3)
    assert third.bytes == {"activations-up": 33, "activations-down": 16, "parameters-up": 6, "parameters-down": 16}
    assert (third.steps, third.messages, third.client_flops, third.server_flops) == (0, 3, 200, 333)
    assert part_of(ROUND, 0.0) == Report(bytes=dict.fromkeys(ROUND.bytes, 0))


@settings(max_examples=60, deadline=None)
@given(reports, st.sampled_from((*COUNTS, *STREAMS)), st.integers(1, 10**6))
def test_cost_grows_with_work_and_bytes(report: Report, what: str, more: int) -> None:
    changes: dict[str, Any] = {"bytes": {**report.bytes, what: report.bytes.get(what, 0) + more}}
    if what in COUNTS:
        changes = {what: getattr(report, what) + more}
    before, after = (cost(told, SLOW, 50.0) for told in (report, replace(report, **changes)))
    assert after.seconds > before.seconds and after.joules > before.joules


@settings(max_examples=60, deadline=None)
@given(reports, st.sampled_from([name for name in FIGURES if name.endswith("_per_s")]), st.floats(1.1, 100))
def test_cost_falls_with_rates(report: Report, rate: str, times: float) -> None:
    slow, fast = SLOW, replace(SLOW, **{rate: getattr(SLOW, rate) * times})
    before, after = (cost(report, profile, 50.0) for profile in (slow, fast))
    assert after.seconds <= before.seconds and after.joules <= before.joules
    if "fp16" in rate:
        assert after == before, "rates of another precision"


clients = st.dictionaries(
    st.integers(0, 20),
    st.builds(Visits, st.floats(0, 9), st.floats(0, 9), st.floats(0.01, 9), st.integers(0, 6)),
    min_size=1,
    max_size=6,
)


def seconds(fleet: dict[int, Visits], workers: int) -> dict[int, float]:
    """When each client's last visit ends."""
    waits = queues(fleet, workers)
    own = {c: v.first_s + v.count * v.serve_s + max(0, v.count - 1) * v.between_s for c, v in fleet.items()}
    return {client: waits[client] + own[client] for client in fleet}


@settings(max_examples=100, deadline=None)
@given(clients, st.integers(1, 3))
def test_the_queue(fleet: dict[int, Visits], workers: int) -> None:
    waits = queues(fleet, workers)
    assert set(waits) == set(fleet) and all(wait >= 0 for wait in waits.values())
    assert waits == queues(dict(reversed(fleet.items())), workers), "the order of the dictionary is none"
    assert not any(queues(fleet, 0).values()) and max(queues(fleet, len(fleet)).values()) == 0
    # Nobody is served twice at once: the last one leaves no earlier than all the work allows.
    work = sum(visits.serve_s * visits.count for visits in fleet.values())
    assert max(seconds(fleet, workers).values()) >= work / workers - 1e-6
    busy = {client: visits for client, visits in fleet.items() if visits.count}
    if workers == 1 and busy and all(v.count == 1 for v in busy.values()):
        order = sorted(busy, key=lambda client: (busy[client].first_s, client))
        free = 0.0
        for client in order:
            begins = max(free, busy[client].first_s)
            assert waits[client] == pytest.approx(begins - busy[client].first_s)
            free = begins + busy[client].serve_s


def test_two_clients_at_one_worker_take_turns_and_the_lower_number_goes_first() -> None:
    each = Visits(first_s=1.0, between_s=1.0, serve_s=2.0, count=2)
    # 3 and 7 arrive at 1; 3 until 3, 7 until 5; 3 is back at 4, waits until 5, leaves at 7; 7 is back at 6.
    assert queues({7: each, 3: each}, 1) == {7: 2.0 + 1.0, 3: 1.0}


def test_visits_divide_a_round_evenly() -> None:
    up = replace(ROUND, bytes={**ROUND.bytes, "gradients-up": 100}, local_flops=100)
    whole = cost(up, SLOW, 500.0)
    way = visits(up, whole, SLOW)
    assert way.count == 4 and way.serve_s == pytest.approx(whole.server_s / 4)
    after = 20 / 10 + 0.5
    last = way.between_s / 2 + after
    total = way.first_s + 3 * way.between_s + 4 * way.serve_s + last
    assert total == pytest.approx(whole.seconds)
    assert visits(ROUND, cost(ROUND, SLOW), SLOW).count == 2, "nothing comes back: one visit a step"
    alone = replace(ROUND, bytes={"parameters-up": 20, "parameters-down": 50})
    assert visits(alone, cost(alone, SLOW), SLOW) == Visits(cost(alone, SLOW).seconds, 0.0, 0.0, 0)
