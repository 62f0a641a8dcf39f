"""A run outlives its broken clients: they are left out by name, and the rest is merged as if they were not there."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedsplit import experiment, runs
from fedsplit.cli.main import main
from fedsplit.client import client_round
from fedsplit.config import Config, resolve
from fedsplit.progress import Silent
from fedsplit.round import sample
from fedsplit.runtime.inprocess import Loop, Pool, runner
from fedsplit.types import Failure, FedsplitError, Job, Scalar, Tensors, Update
from fedsplit.wire.frame import pack, unpack
from fedsplit.world import World, world

TINY: dict[str, Scalar] = {
    "data.limit": 60,
    "data.test-limit": 20,
    "data.partition": "size",
    "data.sizes": "10,30,20",
    "devices.count": 3,
    "model.image-size": 16,
    "rounds": 2,
    "local.batch-size": 8,
    "local.max-steps": 1,
}
SCHEDULES: dict[str, dict[str, Scalar]] = {
    "splitfed-v1": {},
    "splitfed-v2": {"server.schedule": "splitfed-v2", "cut.shape": "vanilla"},
    "sequential": {"server.schedule": "sequential"},
}
REASONS = {
    "raise": "RuntimeError: injected fault 'raise'",
    "kill": "RuntimeError: injected fault 'kill'",
    "hang": "RuntimeError: injected fault 'hang'",
    "nan": "holds values that are not finite",
    "shape": "instead of float32",
    "name": "that was not asked for",
    "negative": "it counts -30 samples",
    "zero": "it counts 0 samples",
    "large": "over the limit of",
}


def tiny(schedule: str = "splitfed-v1", **changes: Scalar) -> Config:
    """Three devices of 10, 30 and 20 samples, two rounds of one step."""
    return resolve({**TINY, **SCHEDULES[schedule]}).replace(**changes)


def expected(built: World, missing: set[tuple[int, int]], attempts: Mapping[int, int] | None = None) -> str:
    """The digest of the model when the (client, round) of `missing` are not there, worked out by hand.

    `attempts` says which attempt at a round counts; the first, if it does not.
    """
    schedule = built.config.server.schedule
    model, moments = dict(built.initial), {}
    for number in range(1, built.config.rounds + 1):
        updates: dict[int, Tensors] = {}
        turn = dict(model)
        for client in sample(built, number, (attempts or {}).get(number, 0)):
            if (client, number) in missing:
                continue
            down = pack({name: turn[name] for name in built.client})
            server = pack({name: turn[name] for name in built.server} | moments)
            update = client_round(built, Job(client, number, 0, down, server))
            left = unpack(update.server)
            updates[client] = {**unpack(update.up), **{name: left[name] for name in built.server}}
            if schedule != "splitfed-v1":
                moments = {name: value for name, value in left.items() if "|" in name}
                names = model if schedule == "sequential" else built.server
                turn |= {name: updates[client][name] for name in names}
        shared = {"splitfed-v1": list(model), "splitfed-v2": list(built.client), "sequential": []}[schedule]
        weights = {client: len(built.shards[client]) for client in sorted(updates)}
        for name in shared:
            turn[name] = _mean({client: updates[client][name] for client in weights}, weights)
        model = turn
    built.load(model)
    return runs.sha256(built.model_state())


def _mean(values: Mapping[int, Tensor], weights: Mapping[int, int]) -> Tensor:
    """The average by numbers of samples, summed in float64 in the order of the clients."""
    total = torch.zeros_like(next(iter(values.values())), dtype=torch.float64)
    for client in sorted(values):
        total.add_(values[client].double(), alpha=weights[client] / sum(weights.values()))
    return total.float()


@cache
def expected_without(schedule: str, client: int, number: int) -> str:
    """`expected` for one failure in the tiny run, worked out once."""
    return expected(world(tiny(schedule)), {(client, number)})


def table(run: Path, name: str) -> list[dict[str, str]]:
    with (run / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def held(run: Path, watched: Silent, schedule: str, client: int, reason: str) -> None:
    """The run is whole, but for `client` in round 1, which is left out for `reason`."""
    summary = json.loads((run / "summary.json").read_text())
    assert summary["failures"] == 1 and summary["rounds"] == 2
    assert [note for note in watched.notes if f"client {client} is left out" in note and reason in note]
    assert len(watched.notes) == 1
    assert [row["failures"] for row in table(run, "rounds")] == ["1", "0"]
    assert [row["clients"] for row in table(run, "rounds")] == ["2", "3"]
    failed = [row for row in table(run, "clients") if row["failure"]]
    assert [(row["round"], row["client"]) for row in failed] == [("1", str(client))]
    assert reason in failed[0]["failure"] and failed[0]["samples"] == ""
    assert len(table(run, "clients")) == 6
    model = load_file(run / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in model.values())
    assert runs.sha256(model) == summary["weights_sha256"] == expected_without(schedule, client, 1)
    assert all(torch.isfinite(torch.tensor(float(row["loss"]))) for row in table(run, "rounds"))


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [("splitfed-v1", kind) for kind in REASONS]
    + [(schedule, kind) for schedule in ("splitfed-v2", "sequential") for kind in ("raise", "nan", "negative", "name")],
)
def test_a_broken_client_is_left_out(schedule: str, kind: str, tmp_path: Path) -> None:
    config = tiny(schedule, engine__faults=f"{kind}:1@1", out=str(tmp_path / "run"))
    watched = Silent()
    run = experiment.run(config, Loop(config), progress=watched)
    held(run, watched, schedule, 1, REASONS[kind])


@dataclasses.dataclass
class BrokenServer(Loop):
    """Clients whose server-side frame arrives changed, for client 1 in round 1."""

    spoil: Callable[[bytes], bytes] = bytes

    def run(self, jobs: Sequence[Job]) -> Iterator[Update | Failure]:
        """One result per job, in order."""
        for job, update in zip(jobs, super().run(jobs), strict=True):
            if isinstance(update, Update) and (job.client, job.round) == (1, 1):
                update = dataclasses.replace(update, server=self.spoil(update.server))
            yield update


def _spoiled(change: Callable[[Tensors], object], moment: bool = False) -> Callable[[bytes], bytes]:
    def spoil(frame: bytes) -> bytes:
        tensors = unpack(frame)
        chosen = {name: tensors.pop(name) for name in sorted(tensors) if ("|" in name) == moment}
        assert chosen
        change(chosen)
        return pack({**tensors, **chosen})

    return spoil


def _first(tensors: Tensors) -> str:
    return next(iter(tensors))


SPOILS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nan": (_spoiled(lambda x: x[_first(x)].view(-1)[:1].fill_(float("nan"))), "not finite"),
    "infinite": (_spoiled(lambda x: x[_first(x)].view(-1)[:1].fill_(float("inf"))), "not finite"),
    "missing": (_spoiled(lambda x: x.pop(_first(x))), "it lacks parameter"),
    "unknown": (_spoiled(lambda x: x.update(nobody=torch.ones(1))), "'nobody' that was not asked for"),
    "shape": (_spoiled(lambda x: x.update({_first(x): x[_first(x)].flatten()[:3]})), "instead of float32"),
    "type": (_spoiled(lambda x: x.update({_first(x): x[_first(x)].double()})), "is float64"),
    "garbage": (lambda frame: b"garbage" * 9, "not a frame"),
    "nothing": (lambda frame: b"", "it lacks parameter"),
}


@pytest.mark.parametrize(
    ("schedule", "spoil"),
    [("splitfed-v1", spoil) for spoil in SPOILS]
    + [(schedule, spoil) for schedule in ("splitfed-v2", "sequential") for spoil in ("nan", "missing", "garbage")],
)
def test_a_broken_server_side_is_left_out(schedule: str, spoil: str, tmp_path: Path) -> None:
    config = tiny(schedule, out=str(tmp_path / "run"))
    change, reason = SPOILS[spoil]
    watched = Silent()
    run = experiment.run(config, BrokenServer(config, change), progress=watched)
    held(run, watched, schedule, 1, reason)


@pytest.mark.parametrize("schedule", ["splitfed-v2", "sequential"])
def test_a_broken_server_optimiser_is_left_out(schedule: str, tmp_path: Path) -> None:
    config = tiny(schedule, out=str(tmp_path / "run"))
    spoil = _spoiled(lambda x: x[_first(x)].view(-1)[:1].fill_(float("nan")), moment=True)
    watched = Silent()
    run = experiment.run(config, BrokenServer(config, spoil), progress=watched)
    held(run, watched, schedule, 1, "not finite")


def test_a_client_that_fails_in_every_round(tmp_path: Path) -> None:
    config = tiny(engine__faults="nan:2", out=str(tmp_path / "run"))
    run = experiment.run(config, Loop(config))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["failures"] == 2
    assert summary["weights_sha256"] == expected(world(config), {(2, 1), (2, 2)})


def test_two_of_three_fail_with_a_low_quorum(tmp_path: Path) -> None:
    config = tiny(engine__faults="nan:0@2, raise:1@2", share__quorum=0.0, out=str(tmp_path / "run"))
    run = experiment.run(config, Loop(config))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["failures"] == 2
    assert summary["weights_sha256"] == expected(world(config), {(0, 2), (1, 2)})


def test_below_the_quorum_a_round_is_repeated_with_other_clients(tmp_path: Path) -> None:
    config = tiny(devices__per_round=2, share__quorum=1.0)
    built = world(config)
    first, second = (set(sample(built, 1, attempt)) for attempt in (0, 1))
    assert first != second, "this seed must draw others"
    (lost,) = first - second
    watched = Silent()
    config = config.replace(engine__faults=f"raise:{lost}@1", out=str(tmp_path / "run"))
    run = experiment.run(config, Loop(config), progress=watched)
    assert f"client {lost} is left out" in watched.notes[0]
    assert watched.notes[1] == "round 1: 1 of 2 clients succeeded, below share.quorum=1; repeated"
    rows = table(run, "rounds")
    assert [row["failures"] for row in rows] == ["1", "0"] and [row["clients"] for row in rows] == ["2", "2"]
    done = {int(row["client"]) for row in table(run, "clients") if row["round"] == "1" and not row["failure"]}
    assert done == second
    summary = json.loads((run / "summary.json").read_text())
    assert summary["weights_sha256"] == expected(built, set(), {1: 1})


def same_run(one: Path, two: Path) -> None:
    """Both runs have the same figures, wall time aside."""
    a, b = (json.loads((run / "summary.json").read_text()) for run in (one, two))
    assert a["weights_sha256"] == b["weights_sha256"]
    assert (one / "ledger.csv").read_bytes() == (two / "ledger.csv").read_bytes()
    left, right = ([{**row, "wall_s": ""} for row in table(run, "rounds")] for run in (one, two))
    assert left == right and len(left) == 2


def command(config: Config, *more: str) -> list[str]:
    """`fedsplit run` of a config."""
    default = resolve({}).values
    changed = [f"{name}={value}" for name, value in config.values.items() if value != default[name]]
    return ["run", "--quiet", *(word for pair in changed for word in ("--set", pair)), *more]


@pytest.mark.parametrize("policy", ["stop", "repeat"])
def test_a_run_that_stops_below_its_quorum_goes_on(
    policy: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    faults = "raise:0@2,nan:2@2"
    config = tiny(engine__faults=faults, share__below_quorum=policy, share__attempts=2)
    assert main(command(config, "--out", str(run))) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert captured.err.splitlines()[-1] == (
        "fedsplit: round 2: 1 of 3 clients succeeded, below share.quorum=0.5; "
        f"stopped, go on with: fedsplit resume {run}"
    )
    assert not (run / "summary.json").exists()
    assert (run / "checkpoint" / "round-000001").is_dir() and len(table(run, "rounds")) == 1
    file = run / "config.toml"
    assert f'faults = "{faults}"' in file.read_text()
    file.write_text(file.read_text().replace(f'faults = "{faults}"', 'faults = ""'))
    assert main(["resume", str(run), "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(run)
    undisturbed = config.replace(engine__faults="", out=str(tmp_path / "undisturbed"))
    same_run(run, experiment.run(undisturbed, Loop(undisturbed)))


def test_stopped_in_the_first_round_a_run_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny(engine__faults="zero:0@1,shape:1@1,name:2@1", share__below_quorum="stop")
    assert main(command(config, "--out", str(run))) == 2
    assert "round 1: 0 of 3 clients succeeded" in capsys.readouterr().err
    file = run / "config.toml"
    file.write_text(file.read_text().replace('faults = "zero:0@1,shape:1@1,name:2@1"', 'faults = ""'))
    assert main(["resume", str(run), "--quiet"]) == 0
    undisturbed = config.replace(engine__faults="", out=str(tmp_path / "undisturbed"))
    same_run(run, experiment.run(undisturbed, Loop(undisturbed)))


def test_a_run_that_diverges_stops_with_a_sentence(tmp_path: Path) -> None:
    config = tiny(optimizer__lr=1e30, local__max_steps=2, out=str(tmp_path / "run"))
    watched = Silent()
    with pytest.raises(FedsplitError, match="round 1: 0 of 3 clients succeeded, below share.quorum=0.5; stopped"):
        experiment.run(config, Loop(config), progress=watched)
    assert sum("not finite" in note for note in watched.notes) == 9, "three attempts of three clients"


@dataclasses.dataclass
class Odd(Loop):
    """Client 1's frame is one that its codecs do not expect."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Update | Failure]:
        """One result per job, in order."""
        for job, update in zip(jobs, super().run(jobs), strict=True):
            if isinstance(update, Update) and (job.client, job.round) == (1, 1):
                tensors: dict[str, Any] = {name: x.to(torch.bool) for name, x in unpack(update.up).items()}
                update = dataclasses.replace(update, up=pack(tensors))
            yield update


def test_a_frame_that_its_codec_does_not_expect(tmp_path: Path) -> None:
    config = tiny(wire__parameters_up="half", out=str(tmp_path / "run"))
    watched = Silent()
    run = experiment.run(config, Odd(config), progress=watched)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["failures"] == 1 and "client 1 is left out" in watched.notes[0]


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_clients_the_round(tmp_path: Path) -> None:
    # The last in the queue dies, so that another has ended by then.
    config = tiny(engine__workers=2, engine__faults="kill:2@1", share__quorum=0.0, out=str(tmp_path / "run"))
    clients = runner(config)
    assert isinstance(clients, Pool)
    watched = Silent()
    try:
        run = experiment.run(config, clients, progress=watched)
    finally:
        clients.close()
    rows = table(run, "clients")
    failed = {int(row["client"]) for row in rows if row["failure"]}
    assert 2 in failed and {row["round"] for row in rows if row["failure"]} == {"1"}
    assert {row["failure"] for row in rows if row["failure"]} == {"a worker process died"}
    assert {f"round 1: client {client} is left out: a worker process died" for client in failed} == set(watched.notes)
    assert {int(row["client"]) for row in rows if row["round"] == "2" and not row["failure"]} == {0, 1, 2}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["failures"] == len(failed)
    assert summary["weights_sha256"] == expected(world(config), {(client, 1) for client in failed})
