"""`make demo`'s program: what it shows, and that it fails when the run fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fedsplit.demo
from fedsplit.runtime.superlink import make_absolute
from fedsplit.types import FedsplitError, Scalar

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "rounds=1",
    "data.limit=100",
    "data.test-limit=20",
    "data.partition=iid",
    "devices.count=3",
    "local.max-steps=1",
]


@pytest.mark.slow
def test_the_demo_shows_rounds_a_table_and_where_things_are(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedsplit.demo", *TINY, f"out={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("round   1", "accuracy", "up (MB)", "wall (s)", "run folder", "accuracy.png", "partition.png"):
        assert word in done.stdout, word
    for name in ("accuracy.png", "partition.png", "summary.json", "rounds.csv", "model.safetensors"):
        assert (tmp_path / "run" / name).stat().st_size > 0


def test_a_failed_demo_exits_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That an error at the server fails the Flower run is in test_superlink.py, that a lost quorum is one elsewhere."""

    def fails(*arguments: Any, **options: Any) -> None:
        raise FedsplitError("flwr run failed: 2 of 3 clients succeeded")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(fedsplit.demo, "flwr_run", fails)
    assert fedsplit.demo.main([*TINY, f"out={tmp_path / 'run'}"]) == 1
    assert capsys.readouterr().err == "fedsplit: flwr run failed: 2 of 3 clients succeeded\n"


def test_the_demo_wants_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fedsplit.demo.main([]) == 2 and "top of a checkout" in capsys.readouterr().out


def test_a_bad_key_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    assert fedsplit.demo.main(["sead=1"]) == 1 and "did you mean 'seed'" in capsys.readouterr().err


def test_relative_paths_mean_the_callers_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    values: dict[str, Scalar] = {"out": "x", "resume": "", "data.source": "images", "seed": 1}
    make_absolute(values, tmp_path)
    assert values == {
        "out": str(tmp_path / "x"),
        "resume": "",
        "data.source": str(tmp_path / "images"),
        "seed": 1,
    }
    values = {"data.source": "digits"}
    make_absolute(values, tmp_path)
    assert values == {"data.source": "digits"}
