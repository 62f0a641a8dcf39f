"""Any controller is one file and one dictionary line: its choices are logged, drawn and resumed like the bandit's."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedsplit import control, experiment
from fedsplit.config import keys, resolve
from fedsplit.control.bandit import COLUMNS
from fedsplit.runtime.inprocess import Loop
from fedsplit.types import Scalar, knob

TUNED: dict[str, Scalar] = {
    "data.limit": 60,
    "data.test-limit": 20,
    "data.partition": "iid",
    "data.local-test": 0.2,
    "devices.count": 2,
    "devices.flops-per-s": 1e9,
    "devices.server-flops-per-s": 1e9,
    "rounds": 3,
    "local.batch-size": 8,
    "local.max-steps": 1,
    "body.plans": "layerdrop",
    "body.layerdrop.recover": 0.0,  # the last rounds of a run are then like any other
    "eval.every": 9,
}


@dataclass(frozen=True)
class Pace:
    """Allows one step a round, and every second round says something."""

    first: float = knob(0.1, "a number of round 1", above=0.0)
    groups = 1
    keys = ("local.max-steps",)
    choices = ({"local.max-steps": 1},)
    columns = ("round", "pace", "brought")

    def propose(
        self, memory: dict[str, Any], round: int, groups: int, key: int
    ) -> tuple[list[dict[str, Scalar]], dict[str, Any]]:
        pace = self.first / 2 ** (round - 1)
        return [{"local.max-steps": 1}], {**memory, "pace": pace}

    def observe(self, memory: dict[str, Any], round: int, gains: list[float], seconds: list[float]) -> dict[str, Any]:
        return {**memory, "brought": gains[0]}

    def rows(self, memory: Mapping[str, Any], round: int) -> list[dict[str, Any]]:
        return [{"round": round, "pace": memory["pace"], "brought": memory["brought"]}] if round % 2 else []

    def draw(self, rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
        path.write_text(json.dumps(list(rows)))
        return path


@pytest.fixture(autouse=True)
def pace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(control.CONTROLLERS, "pace", Pace)
    keys.cache_clear()
    yield
    keys.cache_clear()


def run(folder: Path, tune: str, **changes: Scalar) -> list[dict[str, str]]:
    config = resolve({**TUNED, "control.tune": tune, "control.pace.first": 0.2, "out": str(folder)}).replace(**changes)
    experiment.run(config, Loop(config.replace(resume="")))
    return rows(folder)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "choices.csv").open(newline="") as source:
        return list(csv.DictReader(source))


def test_two_controllers_of_different_columns_share_a_table(tmp_path: Path) -> None:
    table = run(tmp_path / "run", "bandit,pace")
    assert list(table[0]) == ["controller", *COLUMNS, "pace", "brought"]
    assert [(row["round"], row["controller"]) for row in table] == [
        ("1", "bandit"), ("1", "pace"), ("2", "bandit"), ("3", "bandit"), ("3", "pace"),
    ]  # fmt: skip
    for row in table:
        strange = ("pace", "brought") if row["controller"] == "bandit" else COLUMNS[1:]
        assert not any(row[column] for column in strange)
    own = [row for row in table if row["controller"] == "pace"]
    assert [float(row["pace"]) for row in own] == [0.2, 0.05] and all(row["brought"] for row in own)
    assert (tmp_path / "run/choices-bandit.png").stat().st_size > 1000
    drawn = json.loads((tmp_path / "run/choices-pace.png").read_text())
    assert drawn == [{column: row[column] for column in Pace.columns} for row in own]
    assert not (tmp_path / "run/choices.png").exists()


@pytest.mark.parametrize(("name", "columns"), [("bandit", COLUMNS), ("pace", Pace.columns)])
def test_a_controller_alone_has_its_own_columns(name: str, columns: tuple[str, ...], tmp_path: Path) -> None:
    table = run(tmp_path / "run", name)
    assert tuple(table[0]) == ("controller", *columns) and {row["controller"] for row in table} == {name}
    assert {path.name for path in (tmp_path / "run").glob("choices*")} == {"choices.csv", "choices.png"}


def test_a_resumed_run_has_the_same_table(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "pace,bandit")
    run(tmp_path / "parts", "pace,bandit", rounds=1)
    assert run(tmp_path / "parts", "pace,bandit", resume=str(tmp_path / "parts")) == whole and len(whole) == 5
