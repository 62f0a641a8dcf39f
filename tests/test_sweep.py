"""Sweeps: what a study asks for, what is refused, what is run and what is not, how one is stopped, and its table."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from pyarrow import csv, parquet
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parent / "runtimes"))

from alike import NANO

from fedsplit.audit import suites
from fedsplit.cli import sweep as command
from fedsplit.cli.main import main
from fedsplit.config import to_toml
from fedsplit.runtime import processes
from fedsplit.sweep import cluster, conduct, folders, pool, study, work
from fedsplit.sweep.pool import Ended
from fedsplit.sweep.work import Order, attempt
from fedsplit.types import FedsplitError, Scalar

TINY = {**NANO, "rounds": 1, "local.max-steps": 1}
STUDY = """
name = "tiny"
config = ["tiny.toml"]
seeds = 2

[set]
"optimizer.lr" = 0.01

[grid]
"cut.front" = [0, 1]
"""
ARMS = """
[[arms]]
name = "none"

[[arms]]
name = "noise"
set = { "front.edits" = "noise" }
"""


class Here:
    """Carries orders out in this process."""

    def each(self, orders: Sequence[Order]) -> Iterator[Ended | None]:
        for order in orders:
            yield None
            yield Ended(order.name, attempt(order), 0.1)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a study of tiny runs, and its config beside it."""

    def made(text: str = STUDY, **values: Scalar) -> str:
        (tmp_path / "tiny.toml").write_text(to_toml({**TINY, **values}))
        (tmp_path / "study.toml").write_text(text)
        return str(tmp_path / "study.toml")

    return made


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process is begun."""

    @contextmanager
    def crew(*_: object) -> Iterator[Here]:
        yield Here()

    monkeypatch.setattr(command, "crew", crew)
    monkeypatch.setattr(pool, "ready", lambda runs: None)


def table(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = parquet.read_table(out / "sweep.parquet").to_pylist()
    return found


def digests(out: Path) -> dict[str, str]:
    """The weights of every run."""
    return {Path(row["folder"]).name: row["weights_sha256"] for row in table(out)}


def test_a_study_is_its_grid_crossed_with_its_arms_and_seeds(write: Callable[..., str], tmp_path: Path) -> None:
    text = STUDY.replace("seeds = 2", "seeds = [3, 5]") + '"front.noise.scale" = [1, 0.5]\n' + ARMS
    runs = study.read(write(text, **{"optimizer.lr": 0.5})).runs(tmp_path)
    assert len(runs) == len({run.name for run in runs}) == 2 * 2 * 2 * 2
    first, last = runs[0], runs[-1]
    assert first.point == {"arm": "none", "cut.front": 0, "front.noise.scale": 1.0} and first.seed == 3
    assert first.name == "none,cut.front=0,front.noise.scale=1.0,seed=3", "1 of a fraction is 1.0"
    assert (first.config.optimizer.lr, first.config.cut.tail) == (0.01, 1), "[set] wins over files"
    assert (last.config.seed, last.config.cut.front, last.config.names("front.edits")) == (5, 1, ("noise",))
    assert (last.path, last.config.name) == (tmp_path / last.name, last.name.removesuffix(",seed=5"))
    assert {run.seed for run in runs[:8]} == {3}, "an early stop leaves a whole grid of fewer seeds"


def test_an_arm_may_bring_files_of_its_own(write: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "arm.toml").write_text("optimizer.lr = 0.25\nrounds = 7\n")
    runs = study.read(write(STUDY + '[[arms]]\nname = "a"\nconfig = "arm.toml"\n')).runs(tmp_path)
    assert {(run.config.rounds, run.config.optimizer.lr) for run in runs} == {(7, 0.01)}


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "a,seed=0"),
        ({"front.edits": "noise,shuffle", "x": True}, "a,front.edits=noise+shuffle,x=true,seed=0"),
        ({"path": "/data/a b"}, "a,path=-data-a-b-"),
        ({"path": "noise+shuffle"}, "a,path=noise+shuffle-"),
        ({"long": "x" * 300}, "a,long=xxx"),
    ],
)
def test_a_folder_is_named_after_its_values(values: dict[str, Scalar], name: str) -> None:
    made = study.folder_name("a", values, 0)
    assert made.startswith(name) and len(made) < 200 and "/" not in made
    assert made == name or len(made.removesuffix(",seed=0").rpartition("-")[2]) == 8, "with a digest"
    assert study.folder_name("", {}, 3) == "seed=3"


WRONG: dict[str, tuple[Callable[[str], str], str]] = {
    "no TOML": (lambda text: "name =", "is not valid TOML"),
    "an entry": (lambda text: text.replace("seeds", "seedz"), "unknown entry 'seedz' (did you mean 'seeds'?)"),
    "a key": (lambda text: text.replace("cut.front", "cut.frnt"), "cut.frnt=0: Unknown config key 'cut.frnt' (did you"),
    "a type": (lambda text: text.replace("[0, 1]", '["x"]'), "cut.front must be a whole number, got 'x'"),
    "a cut": (lambda text: text.replace("[0, 1]", "[0, 9]"), "cut.front=9,seed=0: cut.front=9 and cut.tail=1"),
    "one value": (lambda text: text.replace("[0, 1]", "1"), "must be a list of values, got 1"),
    "nothing": (lambda text: text.replace("[0, 1]", "[]"), "must be a list of values, got []"),
    "twice": (lambda text: text.replace("[0, 1]", "[1, 1]"), "[grid] cut.front has a value twice"),
    "the same": (lambda text: text + '"data.alpha" = [1, 1.0]\n', "Two points of the study have the same values"),
    "both": (lambda text: text + '"optimizer.lr" = [0.1]\n', "optimizer.lr stands in [grid] and in [set]"),
    "seed": (lambda text: text + "seed = [1]\n", "A study does not set seed: write seeds = N"),
    "workers": (lambda text: text + '"engine.workers" = [2]\n', "A study does not set engine.workers: give --jobs N"),
    "seeds": (lambda text: text.replace("seeds = 2", "seeds = [1, 1]"), "seeds must be a number of seeds"),
    "audit": (lambda text: f'audit = "quik"\n{text}', "There is no audit suite 'quik'; known: quick"),
    "an arm": (lambda text: text + "[[arms]]\nset = {}\n", "An arm needs a name"),
    "two arms": (lambda text: text + ARMS + ARMS, "Two arms have the name 'none'"),
    "a file": (lambda text: text.replace("tiny.toml", "none.toml"), "Cannot read the config file none.toml"),
    "devices": (lambda text: text + '"devices.per-round" = [2, 3]\n', "devices.per-round=3 is more than the 2 devices"),
    "a tracker": (lambda text: text + 'track = ["", "nobody"]\n', "track names no piece 'nobody'"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.usefixtures("here")
def test_what_is_wrong_is_one_sentence_before_anything_runs(
    case: str, write: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said = WRONG[case]
    assert main(["sweep", write(change(STUDY)), "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("here")
def test_a_dry_run_runs_nothing(write: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["sweep", write(STUDY + ARMS), "--out", str(tmp_path / "out"), "--dry-run"]
    assert main(asked) == 0
    assert "tiny: 4 points, 8 runs" in capsys.readouterr().out
    assert main([*asked, "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert len(runs) == 8 and runs[0]["folder"] == str(tmp_path / "out" / "none,cut.front=0,seed=0")
    assert {(run["arm"], run["cut.front"], run["seed"], run["finished"]) for run in runs} == {
        (arm, front, seed, False) for arm in ("none", "noise") for front in (0, 1) for seed in (0, 1)
    }
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("here")
def test_the_table_has_every_run_and_what_is_there_is_not_run_again(
    write: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(["sweep", write(), "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == str(out / "sweep.csv") and "0.0" in shown.out and "±" in shown.out
    assert "[1 of 4] cut.front=0,seed=0  accuracy" in shown.err and " left" in shown.err and "\x1b" not in shown.err
    rows = table(out)
    assert csv.read_csv(out / "sweep.csv").to_pylist() == rows
    assert [(row["cut.front"], row["seed"]) for row in rows] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    for row in rows:
        summary = json.loads((Path(row["folder"]) / "summary.json").read_text())
        figures = {name: value for name, value in summary.items() if name != "provenance"}
        assert {name: row[name] for name in figures} == figures
        assert not (Path(row["folder"]) / "checkpoint").exists()
    monkeypatch.setattr(work, "train", lambda *_, **__: pytest.fail("run again"))
    assert main(["sweep", write(), "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["runs"], document["finished"], document["failed"]) == (4, 4, {}) and table(out) == rows
    each = [row["accuracy"] for row in rows if row["cut.front"] == 1]
    assert document["points"][1]["accuracy_mean"] == pytest.approx(sum(each) / 2)
    changed = STUDY.replace("0.01", "0.02")
    assert main(["sweep", write(changed), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "holds a run with optimizer.lr=0.01, not 0.02; delete it or choose another --out" in said
    assert table(out) == rows and (out / "study.toml").read_text() == STUDY


@pytest.mark.usefixtures("here")
def test_a_run_that_fails_ends_no_other_and_is_tried_again(
    write: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, out = work.train, tmp_path / "out"

    def fails(values: Any, name: str, **options: Any) -> None:
        if name == "cut.front=1,seed=0":
            raise FedsplitError("round 1: below quorum.")
        if name == "cut.front=0,seed=1":
            raise MemoryError("too large")
        train(values, name, **options)

    monkeypatch.setattr(work, "train", fails)
    assert main(["sweep", write(), "--out", str(out)]) == 1
    shown = capsys.readouterr()
    assert "Failed: cut.front=1,seed=0: round 1: below quorum." in shown.out
    assert "Failed: cut.front=0,seed=1: MemoryError: too large" in shown.out and "2 of 4 runs failed" in shown.out
    assert shown.out.splitlines()[-1] == str(out / "sweep.csv") and "FAILED" in shown.err
    assert "Traceback" in (out / "logs" / "cut.front=0,seed=1.log").read_text(), "not on the terminal"
    assert set(digests(out)) == {"cut.front=0,seed=0", "cut.front=1,seed=1"}
    monkeypatch.setattr(work, "train", train)
    assert main(["sweep", write(), "--out", str(out)]) == 0
    assert "2 of 4 runs are already there" in capsys.readouterr().err and len(digests(out)) == 4


@pytest.mark.usefixtures("here")
def test_audits_join_the_table(write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small: dict[str, Scalar] = {"audit.attacks": "closed-form", "audit.victims": 4, "audit.images": 16}
    monkeypatch.setitem(suites.SUITES, "small", small)  # type: ignore[index]
    text = STUDY.replace("[0, 1]", "[0]").replace("seeds = 2", 'seeds = 1\naudit = "small"')
    out = tmp_path / "out"
    assert main(["sweep", write(text), "--out", str(out)]) == 0
    (row,) = table(out)
    found = json.loads((Path(row["folder"]) / "audit" / "audit.json").read_text())
    assert row["worst_ssim"] == found["worst_ssim"] > 0 and row["worst_attack"] == "closed-form"
    asked: list[Any] = []
    monkeypatch.setattr(work, "attack", lambda path, suite, pairs: asked.append(pairs))
    assert main(["sweep", write(text), "--out", str(out)]) == 0 and not asked
    more = text.replace("[set]", '[set]\n"audit.victims" = 3')
    assert main(["sweep", write(more), "--out", str(out)]) == 0 and asked == [("audit.victims=3",)]


def test_what_is_left_follows_from_rounds_and_samples(write: Callable[..., str], tmp_path: Path) -> None:
    text = STUDY.replace("[0, 1]", "[1]").replace("[set]", "[set]\nrounds = 4") + '"data.limit" = [60, 180]\n'
    small, large, *_ = runs = study.read(write(text)).runs(tmp_path)
    assert conduct.effort(large) == 3 * conduct.effort(small)
    pace = conduct.Pace(runs, 100.0, dict.fromkeys((run.name for run in runs), 0.0))
    assert pace.left_s((), 110.0) is None
    assert pace.left_s((small.name,), 110.0) == pytest.approx(70.0), "1 of 8 parts took 10 s"
    large.path.mkdir()
    (large.path / "rounds.csv").write_text("round\n1\n2\n")
    assert folders.done(large.path, 4) == 0.5
    assert pace.left_s((small.name,), 110.0) == pytest.approx(10 / 2.5 * 5.5)
    assert [command.duration(seconds) for seconds in (7.4, 600, 9000)] == ["7 s", "10 min", "2.5 h"]


@pytest.mark.usefixtures("here")
def test_two_sweeps_do_not_write_to_one_folder(
    write: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with conduct._alone(tmp_path / "out"):
        assert main(["sweep", write(), "--out", str(tmp_path / "out")]) == 2
    assert "Another fedsplit sweep is at work" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_stopped_sweep_leaves_no_process_and_goes_on_to_the_same_weights(
    write: Callable[..., str], tmp_path: Path
) -> None:
    arms = '[[arms]]\nname = "a"\n[[arms]]\nname = "b"\nset = { "optimizer.lr" = 0.02 }\n'
    file, out = write('config = "tiny.toml"\n[set]\nrounds = 6\n' + arms), tmp_path / "out"
    with processes.no_process_left() as mark:
        sweep = subprocess.Popen(
            [sys.executable, "-m", "fedsplit.cli.main", "sweep", file, "--out", str(out), "--jobs", "1"],
            env={**os.environ, processes.MARK: mark}, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            # Who starts the tests in the background of a script has its children ignore SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        while not folders.done(out / "a,seed=0", 6):
            assert sweep.poll() is None, sweep.communicate()
            time.sleep(0.005)
        os.killpg(sweep.pid, signal.SIGINT)  # as a terminal does
        said = sweep.communicate(timeout=60)
        assert sweep.returncode == 130 and "the same command goes on" in said[1], said
        assert "Traceback" not in said[1] and not said[0]
        gone(mark)
    assert not (out / "b,seed=0" / "summary.json").exists()
    assert main(["sweep", file, "--out", str(out)]) == 0
    assert main(["sweep", file, "--out", str(tmp_path / "whole")]) == 0
    assert digests(out) == digests(tmp_path / "whole") and len(set(digests(out).values())) == 2


def gone(mark: str) -> None:
    """No process of a stopped sweep is left, within a while."""
    deadline = time.monotonic() + 20
    while left := [one for one in processes._marked(mark) if one.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, [one.cmdline() for one in left]
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("address", "said"), [("nonsense", "is no address"), ("127.0.0.1:9", "no Ray cluster answers")]
)
def test_a_cluster_that_does_not_answer_is_refused(address: str, said: str) -> None:
    with pytest.raises(FedsplitError, match=said), cluster.connected(address, None):
        pytest.fail("connected")


@pytest.mark.slow
def test_ray_tasks_come_to_the_same_weights(write: Callable[..., str], tmp_path: Path, here: None) -> None:
    text = STUDY.replace("[0, 1]", "[1]").replace("seeds = 2", "seeds = 1")
    assert main(["sweep", write(text), "--out", str(tmp_path / "here")]) == 0
    asked = study.read(write(text))
    runs = asked.runs(tmp_path / "there")
    bad = Order("bad", {**runs[0].config.values, "out": str(tmp_path / "bad"), "devices.per-round": 9})
    watch = command.Follow(Console(file=io.StringIO()))
    with cluster.connected("local", 1) as crew:
        result = conduct.sweep(asked, runs, {}, tmp_path / "there", crew, watch)
        ended = [each for each in crew.each([bad]) if each is not None]
    assert not result.failed and digests(tmp_path / "there") == digests(tmp_path / "here")
    assert "devices.per-round=9 is more than" in ended[0].error
