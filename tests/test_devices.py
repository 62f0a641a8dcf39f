"""Availability, and what the virtual clock does to a round; plan and run agree."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fleets import FLEET, TINY, built, run

from fedsplit import experiment
from fedsplit.config import resolve
from fedsplit.devices import AVAILABILITY
from fedsplit.devices.availability import Diurnal, Random, Trace
from fedsplit.devices.cohort import dropout, gather, settle
from fedsplit.plan import account
from fedsplit.round import run_round
from fedsplit.runs import RunFolder
from fedsplit.runtime.inprocess import Loop
from fedsplit.tables import to_accuracy
from fedsplit.types import Failure, FedsplitError, Job, Report, Update


@pytest.mark.parametrize("name", AVAILABILITY)
def test_availability_is_seeded_and_holds_until_it_changes(name: str, tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("device,from_s,to_s\n0,0,100\n1,50,250\n0,300,400.5\n")
    piece = Trace(str(file)) if name == "trace" else AVAILABILITY[name]()
    time_s = 12.5
    for _ in range(30):
        there = piece.available(7, time_s, 3)
        assert there.shape == (7,) and there.dtype == bool
        after = piece.changes_s(time_s)
        assert after > time_s
        if math.isinf(after):
            assert there.all()
            break
        for fraction in (0.3, 0.9):
            assert (piece.available(7, time_s + fraction * (after - time_s), 3) == there).all()
        time_s = after


def test_a_trace_wraps_and_serves_any_number_of_devices(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("device,from_s,to_s\n5,0,100\n9,50,250\n")
    piece = Trace(str(file))
    seen = {now: piece.available(3, now, 0).tolist() for now in (0.0, 50.0, 100.0, 249.0, 250.0, 25_100.0)}
    assert seen[0.0] == seen[250.0] == [True, False, True], "of two traced devices the third takes the first"
    assert seen[50.0] == [True] * 3 and seen[100.0] == seen[249.0] == seen[25_100.0] == [False, True, False]
    assert [piece.changes_s(now) for now in (0.0, 60.0, 100.0, 249.0)] == [50.0, 100.0, 250.0, 250.0]
    for text, message in (
        ("a,b\n1,2\n", "needs the columns"),
        ("device,from_s,to_s\n1,9,3\n", "swap them"),
        ("", "no rows"),
    ):
        wrong = tmp_path / f"{len(text)}.csv"
        wrong.write_text(text)
        with pytest.raises(FedsplitError, match=message):
            Trace(str(wrong)).available(1, 0.0, 0)


def test_certain_availability_is_always() -> None:
    for piece in (Random(1.0), Diurnal(1.0, 1.0)):
        assert all(piece.available(50, 1800.0 * slot, 0).all() for slot in range(100))


def test_draws_meet_their_probability() -> None:
    there = np.array([Random(0.3, 10.0).available(50, 10.0 * slot, 0) for slot in range(200)])
    assert there.mean() == pytest.approx(0.3, abs=0.02)
    day = np.array([Diurnal(0.1, 0.9, 0.0, 3600.0).available(2000, 3600.0 * hour, 0).mean() for hour in range(24)])
    assert day[6] == pytest.approx(0.9, abs=0.04) and day[18] == pytest.approx(0.1, abs=0.04)
    spread = [Diurnal().available(2000, 3600.0 * hour, 0).mean() for hour in range(24)]
    assert spread == pytest.approx([0.5] * 24, abs=0.06)


def test_the_clock_waits_until_enough_devices_are_there(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("device,from_s,to_s\n0,0,10\n1,5,10\n2,8,10\n3,8,10\n4,8,9\n5,9,10\n")
    trace = {"devices.availability": "trace", "devices.trace.file": str(file), "devices.per-round": 2}
    some = built(**trace)
    at = {now: gather(some, 1, 0, now) for now in (0.0, 6.0, 10.0)}
    assert (at[0.0].waited_s, at[6.0].waited_s, at[10.0].waited_s) == (5.0, 0.0, 5.0)
    assert all(set(cohort.clients) == {0, 1} and cohort.wanted == 2 for cohort in at.values())
    assert gather(built(**{**trace, "devices.per-round": 0}), 1, 0, 0.0).waited_s == 8.0, "all: at least a quorum"
    with pytest.raises(FedsplitError, match="6 devices were not available at once"):
        gather(built(**{**trace, "devices.per-round": 6}), 1, 0)
    always = gather(built(**{"devices.per-round": 4}), 2, 1)
    assert always.waited_s == 0 and len(always.clients) == 4


def report(flops: int) -> Report:
    """A round that only computes."""
    return Report(client_flops=flops, bytes={"parameters-up": 10**6})


def test_over_selection_takes_the_first_and_a_deadline_those_in_time() -> None:
    some = built(**{"devices.per-round": 3, "devices.over-select": 1.5, "devices.jitter": 0.0, "devices.fleet": "pi4"})
    cohort = gather(some, 1, 0)
    assert len(cohort.clients) == 5 and cohort.wanted == 3
    told = {client: report(10**10 * (1 + place)) for place, client in enumerate(cohort.clients)}
    done = settle(some, cohort, told)
    assert set(done.costs) == set(cohort.clients[:3])
    assert done.whole.seconds == pytest.approx(3e10 / 1.2e10 + 0.4)
    assert {lost.client: lost.reason for lost in done.lost} == dict.fromkeys(sorted(cohort.clients[3:]), "")
    last = next(lost for lost in done.lost if lost.client == cohort.clients[4])
    assert last.fraction == pytest.approx(2.9 / (5e10 / 1.2e10 + 0.4))
    assert last.report.client_flops == int(5e10 * last.fraction) and last.cost.seconds == pytest.approx(2.9)
    assert settle(some, cohort, dict(reversed(told.items()))) == done, "who really finishes first does not matter"
    energy = sum(cost.joules for cost in done.costs.values()) + sum(lost.cost.joules for lost in done.lost)
    assert done.whole.joules == pytest.approx(energy)
    first = done.costs[cohort.clients[0]]
    assert first.idle_s == pytest.approx(2e10 / 1.2e10)
    assert first.joules == pytest.approx(6.4 * (1e10 / 1.2e10 + 0.4) + 2.7 * first.idle_s)
    short = built(**{"devices.deadline-s": 2.2, "devices.jitter": 0.0, "devices.fleet": "pi4"})
    whole = gather(short, 1, 0)
    done = settle(short, whole, {client: report(10**10 * (1 + place)) for place, client in enumerate(whole.clients)})
    assert set(done.costs) == set(whole.clients[:2]) and done.whole.seconds == 2.2
    equal = settle(some, cohort, {client: report(10**10) for client in cohort.clients})
    assert set(equal.costs) == set(cohort.clients[:3]), "of equals, those drawn first"


def test_who_drops_out_and_who_straggles_is_drawn() -> None:
    some = built(**{"devices.dropout": 0.3, "devices.straggle": 0.2, "devices.straggle-factor": 4.0})
    cohorts = [gather(some, number, 0) for number in range(1, 101)]
    drawn = [dropout(some, cohort, client) for cohort in cohorts for client in cohort.clients]
    fractions = [fraction for fraction in drawn if fraction is not None]
    assert len(fractions) / len(drawn) == pytest.approx(0.3, abs=0.06) and np.mean(fractions) == pytest.approx(
        0.5, abs=0.08
    )
    told = {client: report(10**9) for client in range(6)}
    slow = 0
    plain = built()
    for cohort in cohorts[:40]:
        costs = settle(some, cohort, told).costs
        alone = settle(plain, gather(plain, cohort.number, 0), told).costs
        for client, cost in costs.items():
            assert cost.compute_s / alone[client].compute_s == pytest.approx(1) or cost.compute_s / alone[
                client
            ].compute_s == pytest.approx(4)
            slow += cost.compute_s > 2 * alone[client].compute_s
    assert 15 < slow < 60


class Backwards(Loop):
    """Clients whose results come in reverse."""

    def run(self, jobs: Any) -> Any:
        """All results, the last first."""
        yield from reversed(list(super().run(jobs)))


STORMY: dict[str, Any] = {
    "devices.dropout": 0.25, "devices.straggle": 0.3, "devices.per-round": 4, "devices.over-select": 1.5,
    "devices.server-workers": 1, "devices.availability": "random", "devices.random.period-s": 5.0, "share.quorum": 0.25,
}  # fmt: skip
WEATHER: dict[str, dict[str, Any]] = {
    "stormy": STORMY,
    "deadline": {"devices.deadline-s": 3.46, "devices.server-workers": 2, "share.quorum": 0.1},
    "in turn": {"server.schedule": "splitfed-v2", "devices.dropout": 0.4, "share.quorum": 0.0},
    "below": {"devices.dropout": 0.5, "share.quorum": 0.6, "share.attempts": 9},
}
SFPROMPT = {"data.select": "el2n", "local.phases": "self-update", "train": "tail", "front.cache": True}


@pytest.mark.parametrize("weather", WEATHER)
def test_a_plan_and_a_run_agree_on_the_clock(weather: str, tmp_path: Path) -> None:
    more = SFPROMPT if weather == "stormy" else {}
    config = resolve({**TINY, **FLEET, **WEATHER[weather], **more})
    folder, summary = run(config, tmp_path / "run")
    total = account(config).figures()["total"]
    for name in ("virtual_s", "energy_j", "client_flops", "server_flops", "bytes_up", "bytes_down"):
        assert total[name] == summary[name], name
    rows, rounds = folder.rows("clients"), folder.rows("rounds")
    phases = ("download_s", "compute_s", "upload_s", "latency_s", "server_s", "queue_s", "idle_s")
    if weather != "in turn" and weather != "below":
        for row in rows:
            whole = rounds[int(row["round"]) - 1]
            lasts = sum(float(row[name]) for name in phases)
            limit = float(whole["virtual_s"]) - float(whole["waited_s"])
            assert lasts == pytest.approx(limit) or (row["failure"] and lasts < limit)
    lost = [row for row in rows if row["failure"] or row["late"]]
    assert lost and summary["wasted_bytes"] > 0 and 0 < summary["wasted_j"] < summary["energy_j"]
    dropped = [row for row in rows if row["failure"]]
    assert all(row["failure"].startswith("dropped out after") for row in dropped)
    if weather != "below":  # attempts that are repeated count no bytes
        wasted = sum(int(row[name]) for row in lost for name in row if name.startswith("bytes_"))
        assert wasted == summary["wasted_bytes"] and summary["late"] == len(lost) - len(dropped)
    assert sum(int(row[name]) for row in rows for name in row if name.startswith("bytes_") and row[name]) == (
        summary["bytes_up"] + summary["bytes_down"]
    )


def test_the_order_of_results_changes_nothing_and_a_resumed_run_keeps_its_clock(tmp_path: Path) -> None:
    config = resolve({**TINY, **FLEET, **STORMY})
    whole, summary = run(config, tmp_path / "whole")
    other = experiment.run(config.replace(out=str(tmp_path / "other")), Backwards(config))
    half, _ = run(config.replace(rounds=1), tmp_path / "half")
    resumed = config.replace(resume=str(half.path), out="")
    experiment.run(resumed, Loop(resumed))
    drop = {"wall_s"}
    for folder in (RunFolder(other), half):
        again = json.loads((folder.path / "summary.json").read_text())
        assert again["weights_sha256"] == summary["weights_sha256"]
        for table in ("rounds", "clients", "ledger"):
            mine, theirs = ([{k: r[k] for k in r if k not in drop} for r in f.rows(table)] for f in (whole, folder))
            if folder is half:  # that run tested its model after round 1, which was its last
                mine, theirs = ([{**r, "accuracy": "", "loss": ""} for r in rows] for rows in (mine, theirs))
            assert mine == theirs
    assert summary["waited_s"] >= 0 and {row["profile"] for row in whole.rows("clients")} >= {"raspberry-pi-4"}


def test_what_is_lost_changes_no_weight_and_no_memory() -> None:
    some = built(**{"devices.dropout": 0.5, "share.quorum": 0.0, "devices.fleet": "pi4"})
    first = experiment.start(some)
    outcome = run_round(some, first, 0, Loop(some.config), lambda _: None)
    lost = {loss.client for loss in outcome.lost}
    stayed = {update.client for update in outcome.updates}
    assert lost and stayed and lost | stayed == set(range(6)) and lost == {f.client for f in outcome.failures}

    class Honest(Loop):
        def run(self, jobs: list[Job]) -> Any:
            for job in jobs:
                result: Update | Failure = Failure(job.client, "away")
                if job.client in stayed:
                    (result,) = super().run([job])
                yield result

    calm = built(**{"devices.fleet": "pi4", "share.quorum": 0.0})
    same = run_round(calm, first, 0, Honest(calm.config), lambda _: None)
    assert all(torch.equal(outcome.state.model[name], same.state.model[name]) for name in same.state.model)
    assert set(outcome.state.memory) == set(same.state.memory) <= stayed


@pytest.mark.parametrize("key, value", [("devices.over-select", 1.5), ("devices.deadline-s", 3.0)])
def test_clients_in_turn_cannot_be_left_out(key: str, value: float) -> None:
    config = resolve({**TINY, key: value, "server.schedule": "sequential"})
    with pytest.raises(FedsplitError, match=f"{key} leaves out clients"):
        account(config)


def test_sums_until_an_accuracy() -> None:
    cells = (("", 1, 2.0), ("0.5", 3, 1.0), ("0.7", 5, 1.0), ("0.9", 7, 1.0))
    rows = [
        {"accuracy": a, "virtual_s": str(s), "energy_j": "2.5", "bytes_up": str(b), "bytes_down": "10"}
        for a, b, s in cells
    ]
    found = to_accuracy(rows, 0.6)
    assert found == {"seconds_to_accuracy": 4.0, "joules_to_accuracy": 7.5, "bytes_to_accuracy": 9 + 30}
    nothing = dict.fromkeys(found)
    assert to_accuracy(rows, 0.95) == to_accuracy(rows, 0.0) == nothing


def test_clients_rows_are_whole(tmp_path: Path) -> None:
    config = resolve({**TINY, **FLEET, "rounds": 1})
    folder, summary = run(config, tmp_path / "run")
    assert summary["seconds_to_accuracy"] is None, "no target"
    with (folder.path / "clients.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and all(row["late"] == "" and float(row["idle_s"]) >= 0 for row in rows)
    assert min(float(row["idle_s"]) for row in rows) == 0
