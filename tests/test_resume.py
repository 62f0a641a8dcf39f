"""Invariant 6: train k, stop, resume, train k equals train 2k, bit for bit, for every config and however it died."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedsplit import experiment
from fedsplit.cli.main import main
from fedsplit.config import Config, load, resolve
from fedsplit.progress import Silent
from fedsplit.runs import RunFolder
from fedsplit.runtime.inprocess import Loop
from fedsplit.types import Scalar

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
OTHERS = ("pretrain", "devices", "studies")  # keys of another command; fragments; grids
FILES = sorted(file for file in CONFIGS.glob("**/*.toml") if file.relative_to(CONFIGS).parts[0] not in OTHERS)
TINY: dict[str, Scalar] = {
    "data.limit": 60,
    "data.test-limit": 20,
    "data.partition": "iid",
    "devices.count": 3,
    "devices.per-round": 2,
    "cut.tail": 1,
    "share.partial": "ptls",  # clients, and the server's notes on them, have something to remember
    "model.image-size": 16,
    "rounds": 4,
    "local.batch-size": 8,
    "local.max-steps": 1,
}


class Stopped(Exception):
    """The process died."""


class Dies(Silent):
    """Ends the run when the rows of round `at` are written and its checkpoint is not."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def row(self, row: Mapping[str, Any]) -> None:
        """Die in time."""
        super().row(row)
        if row["round"] == self.at:
            raise Stopped


def tiny(**changes: Scalar) -> Config:
    """Four rounds of a step."""
    return resolve(TINY).replace(**changes)


def shrunk(file: Path) -> Config:
    """A config of the repository, made small: three devices, two rounds of two steps, so that a budget buys one."""
    config = load([file])
    devices = min(3, config.devices.count or 3)
    return config.replace(
        data__source="digits",
        data__limit=60,
        data__test_limit=20,
        data__partition="iid" if config.data.partition == "dirichlet" else config.data.partition,
        devices__count=devices,
        devices__per_round=min(config.devices.per_round, devices),
        local__max_steps=2,
        local__batch_size=8,
        model__image_size=config.model.image_size or (16 if config.model.name == "fedsplit_micro" else 0),
        rounds=2,
    )


def whole(config: Config, folder: Path) -> Path:
    """The run, undisturbed."""
    return experiment.run(config.replace(out=str(folder)), Loop(config))


def died(config: Config, folder: Path, at: int) -> Path:
    """The run as it is left when its process dies in round `at`, after `at - 1` checkpoints."""
    with pytest.raises(Stopped):
        experiment.run(config.replace(out=str(folder)), Loop(config), progress=Dies(at))
    assert not (folder / "summary.json").exists()
    return folder


def resumed(folder: Path) -> Path:
    """Go on to the end."""
    assert main(["resume", str(folder), "--quiet"]) == 0
    return folder


def table(run: Path, name: str) -> list[dict[str, str]]:
    with (run / f"{name}.csv").open(newline="") as file:
        return [{**row, "wall_s": ""} for row in csv.DictReader(file)]


def assert_same(one: Path, two: Path, rounds: int) -> None:
    """Both runs have the same weights and tables, wall time aside."""
    a, b = (json.loads((run / "summary.json").read_text()) for run in (one, two))
    assert a["weights_sha256"] == b["weights_sha256"]
    assert (one / "ledger.csv").read_bytes() == (two / "ledger.csv").read_bytes()
    for name in ("rounds", "clients", "classes"):
        assert table(one, name) == table(two, name), name
    assert [row["round"] for row in table(one, "rounds")] == [str(number + 1) for number in range(rounds)]
    own = {"wall_s", "provenance"}
    assert {k: v for k, v in a.items() if k not in own} == {k: v for k, v in b.items() if k not in own}
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_there_are_configs() -> None:
    names = {str(file.relative_to(CONFIGS)) for file in FILES}
    assert {"smoke.toml", "demo.toml", "baselines/splitfed_v1.toml", "baselines/sequential.toml"} <= names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS).with_suffix("")))
def test_every_config(file: Path, tmp_path: Path) -> None:
    config = shrunk(file)
    stopped = died(config, tmp_path / "stopped", at=2)
    assert len(table(stopped, "rounds")) == 2, "rows of the round without a checkpoint are there"
    assert_same(resumed(stopped), whole(config, tmp_path / "whole"), 2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rounds in one go."""
    return whole(tiny(), tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.fixture(scope="module")
def in_round_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, dead in round 3."""
    return died(tiny(), tmp_path_factory.mktemp("dead") / "run", at=3)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_died_in_round(at: int, undisturbed: Path, tmp_path: Path) -> None:
    assert_same(resumed(died(tiny(), tmp_path / "run", at)), undisturbed, 4)


def test_died_twice(undisturbed: Path, tmp_path: Path) -> None:
    folder = died(tiny(), tmp_path / "run", 2)
    config = tiny(resume=str(folder))
    with pytest.raises(Stopped):
        experiment.run(config, Loop(config), progress=Dies(4))
    assert_same(resumed(folder), undisturbed, 4)


def test_died_between_rare_checkpoints(undisturbed: Path, tmp_path: Path) -> None:
    folder = died(tiny(engine__checkpoint_every=3), tmp_path / "run", 3)
    assert not list((folder / "checkpoint").iterdir()) and len(table(folder, "rounds")) == 3
    assert_same(resumed(folder), undisturbed, 4)


def test_a_moved_run_folder_goes_on(in_round_three: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    shutil.copytree(in_round_three, folder)
    before = table(in_round_three, "rounds")
    assert_same(resumed(folder), undisturbed, 4)
    assert table(in_round_three, "rounds") == before, "the folder that was copied stays as it is"


def _scratch(run: Path) -> None:
    """A checkpoint, the config and a table were being written."""
    shutil.copytree(run / "checkpoint" / "round-000002", run / "checkpoint" / ".round-000003")
    (run / "checkpoint" / ".round-000003" / "state.safetensors").write_bytes(b"half")
    for name in ("config.toml", "rounds.csv", "summary.json"):
        (run / f".{name}.new").write_text("half")


def _no_checkpoint_of_round_two(run: Path) -> None:
    """Rows of two rounds are too many."""
    shutil.rmtree(run / "checkpoint" / "round-000002")


def _half_a_row(run: Path) -> None:
    """The last row is cut off in the middle, here so that its round looks like an early one."""
    for name in ("rounds", "clients", "ledger", "classes"):
        file = run / f"{name}.csv"
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:-1]) + b"1,0")


def _some_tables(run: Path) -> None:
    """Only the first table has the rows of round 3."""
    for name in ("rounds", "ledger", "classes"):
        file = run / f"{name}.csv"
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(line for line in lines if not line.startswith(b"3,")))


def _end_half_written(run: Path) -> None:
    """The model was being written, the summary not yet."""
    (run / "model.safetensors").write_bytes(b"half")


MOMENTS = (_scratch, _no_checkpoint_of_round_two, _half_a_row, _some_tables, _end_half_written)


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__.strip("_"))
def test_nasty_moments(moment: Any, in_round_three: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(in_round_three, folder)
    moment(folder)
    assert_same(resumed(folder), undisturbed, 4)
    assert [file.name for file in sorted((folder / "checkpoint").glob("round-*"))] == ["round-000003", "round-000004"]


def test_a_damaged_newest_checkpoint_may_be_deleted(
    in_round_three: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(in_round_three, folder)
    newest = folder / "checkpoint" / "round-000002"
    (newest / "state.safetensors").write_bytes(b"half")
    assert main(["resume", str(folder), "--quiet"]) == 2
    assert f"{newest} is damaged; delete it to go on from the one before" in capsys.readouterr().err
    shutil.rmtree(newest)
    assert_same(resumed(folder), undisturbed, 4)


def test_a_finished_run_goes_on_to_more_rounds(undisturbed: Path, tmp_path: Path) -> None:
    folder = whole(tiny(rounds=2), tmp_path / "run")
    assert main(["resume", str(folder), "--quiet", "--rounds", "4"]) == 0
    assert_same(folder, undisturbed, 4)
    assert RunFolder.open(folder)[1].rounds == 4, "the config says what the run has become"


def test_a_longer_run_that_died_goes_on_to_its_new_end(undisturbed: Path, tmp_path: Path) -> None:
    folder = whole(tiny(rounds=2), tmp_path / "run")
    config = tiny(resume=str(folder), rounds=4)
    with pytest.raises(Stopped):
        experiment.run(config, Loop(config), progress=Dies(4))
    assert_same(resumed(folder), undisturbed, 4)


def test_resuming_a_finished_run_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    assert_same(resumed(folder), undisturbed, 4)
    assert main(["resume", str(folder), "--quiet", "--rounds", "1"]) == 0
    assert_same(folder, undisturbed, 4)


@pytest.mark.slow
def test_killed(undisturbed: Path, tmp_path: Path, repository: Path) -> None:
    folder = tmp_path / "run"
    config = tiny()
    pairs = [f"{name}={config.values[name]}" for name in TINY]
    words = ["run", "--out", str(folder), "--quiet", *(word for pair in pairs for word in ("--set", pair))]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-m", "fedsplit.cli.main", *words]
    run = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoint" / "round-000001").exists() and time.monotonic() < deadline:
            assert run.poll() is None, "it must not end before it is killed"
            time.sleep(0.002)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert run.returncode == -signal.SIGKILL and not (folder / "summary.json").exists()
    done = subprocess.run(
        [*command[:3], "resume", str(folder)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(folder)
    assert_same(folder, undisturbed, 4)
