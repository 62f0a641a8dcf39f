"""What a user sees while a run runs."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from rich.console import Console

from fedsplit import experiment
from fedsplit.cli.progress import Bar, Lines, Quiet, line, table, watcher
from fedsplit.config import resolve
from fedsplit.runs import RunFolder
from fedsplit.runtime.inprocess import Loop

TINY = {
    "data.limit": 60,
    "data.test-limit": 20,
    "data.partition": "iid",
    "devices.count": 3,
    "local.max-steps": 1,
    "rounds": 2,
    "engine.faults": "raise:1@2",
}


def test_the_bar_shows_the_run_its_rounds_and_who_failed(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    config = resolve({**TINY, "out": str(tmp_path / "run")})
    bar = Bar(console)
    with bar:
        experiment.run(config, Loop(config), progress=bar)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("fedsplit_micro, cut 2/6/0 u-shape", "round   1", "round   2", "1 failed", "client 1 is left out"):
        assert words in shown
    assert "accuracy (%)" in shown and str(tmp_path / "run") in shown
    assert [row["round"] for row in bar.rows] == [1, 2]


def test_lines_say_how_long_it_will_take(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = resolve({**TINY, "out": str(tmp_path / "run")})
    lines = Lines()
    lines.SILENCE_S = 0.0  # type: ignore[misc]
    with caplog.at_level(logging.INFO, logger="fedsplit"):
        experiment.run(config, Loop(config), progress=lines)
    said = [record.getMessage() for record in caplog.records]
    assert any("1 of 3 clients" in text and "s left" in text for text in said)
    assert any(text.startswith("round   2") and text.endswith("about 0 s left") for text in said)
    assert any("client 1 is left out" in text for text in said) and said[-1].startswith("run folder:")


def test_quiet_says_only_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = resolve({**TINY, "out": str(tmp_path / "run")})
    quiet = watcher(quiet=True)
    assert isinstance(quiet, Quiet) and isinstance(watcher(quiet=False), Bar)
    with quiet, caplog.at_level(logging.INFO, logger="fedsplit"):
        path = experiment.run(config, Loop(config), progress=quiet)
    assert all("left out" in record.getMessage() for record in caplog.records) and caplog.records
    console = Console(file=io.StringIO(), width=120)
    console.print(table(RunFolder(path)))
    assert console.file.getvalue().count("│") > 10  # type: ignore[attr-defined]
    row = RunFolder(path).rows("rounds")[0]
    assert "not tested" in line({**row, "accuracy": ""})
