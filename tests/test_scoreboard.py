"""The scoreboard that is kept: the README's table is what the file says, and the file says what the boards claim."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from fedsplit.config import load, to_toml
from fedsplit.types import FedsplitError

sys.path.append(str(Path(__file__).resolve().parents[1] / "simulations"))

import paper
from papers import PAPERS, conduct, kept, record, render, work
from papers.scoreboard import Request, refuse, runs

BOARD = PAPERS["sfprompt"]
CLAIM = BOARD.claims[0].text


def measured(**changes: Any) -> record.Entry:
    entry = next(e for e in record.merged([], []) if e["claim"] == CLAIM and e["partition"] == "IID")
    figures = {"ours": 0.004, "ours_std": 0.001, "seeds": 3, "holds": True, "verdict": "holds"}
    return entry | figures | {"data": "cifar10", "date": "2026-01-02", "commit": "0123456"} | changes


@pytest.fixture
def pages(repository: Path, tmp_path: Path) -> Path:
    """A copy of the file and the pages with its tables."""
    (tmp_path / "docs").mkdir()
    for name in (str(record.FILE), *render.PAGES):
        shutil.copyfile(repository / name, tmp_path / name)
    return tmp_path


def test_the_pages_hold_what_the_file_says_and_the_file_what_the_boards_claim(pages: Path, repository: Path) -> None:
    record.write(root=pages)
    for name in (str(record.FILE), *render.PAGES):
        same = (pages / name).read_text() == (repository / name).read_text()
        assert same, f"{name} is stale: run `python simulations/paper.py none --record`"


def test_every_claim_is_there_measured_or_said_to_be_not_run() -> None:
    every = record.read()
    there = {(e["method"], e["claim"]) for e in every}
    assert there == {(name, claim.text) for name, board in PAPERS.items() for claim in board.claims}
    assert {"sfprompt", "d2ft", "droppeft", "patrol", "caesar"} <= {e["method"] for e in every}
    assert any(e["holds"] is False for e in every), "misses are shown"
    for entry in every:
        if entry["verdict"] == render.NOT_RUN:
            assert entry["ours"] is None and not entry["date"] and not entry["commit"]
            continue
        assert entry["ours"] is not None and entry["seeds"] and entry["scale"] and entry["data"] and entry["source"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry["date"]), entry
        assert re.fullmatch(r"[0-9a-f]{7}\+?(, [0-9a-f]{7}\+?)*", entry["commit"]), entry
        assert "/" not in entry["data"]


def test_every_command_parses() -> None:
    for method, command in {(entry["method"], entry["command"]) for entry in record.read()}:
        words = shlex.split(command)
        assert words[:2] == ["python", "simulations/paper.py"]
        options = paper.parser().parse_args(words[2:])
        assert [board.name for board in paper.chosen(options.method)] == [method]
        refuse(PAPERS[method], options.set)
        load(pairs=options.set)


def test_a_recorded_claim_takes_the_place_of_the_old_one_and_of_not_run_yet() -> None:
    blank = record.merged([], [])
    assert blank and all(e["verdict"] == render.NOT_RUN for e in blank)
    one = record.merged(blank, [measured()])
    assert len(one) == len(blank) and sum(e["ours"] == 0.004 for e in one) == 1
    two = record.merged(one, [measured(ours=0.1, holds=False), measured(data="cars", ours=0.2)])
    its = [(e["data"], e["ours"]) for e in two if e["claim"] == CLAIM and e["partition"] == "IID"]
    assert its == [("cifar10", 0.1), ("cars", 0.2)]
    unknown = [measured(claim="what no board claims"), measured(partition="elsewhere"), measured(claimed=0.9)]
    assert record.merged([], unknown) == blank


def test_the_table_says_misses_and_what_is_within_the_spread() -> None:
    entries = record.merged(
        [], [measured(), measured(partition="Dirichlet 0.5", ours=0.0047, holds=False, verdict="missed")]
    )
    first, second = [line for line in render.short_table(entries).splitlines() if CLAIM in line][:2]
    said = f"`{entries[0]['command']}` | 2026-01-02, 0123456 |"
    assert first == f"| SFPrompt | IID: {CLAIM} | ≤ 0.46 %, ViT-Base | 0.4 % ± 0.1 | holds, within the spread | {said}"
    assert f"| Dirichlet 0.5: {CLAIM} | " in second and "| 0.47 % ± 0.1 | **missed**, within the spread |" in second
    assert "| IID: accuracy comparable to FedAvg's | our bar: ≥ -1.0 points |" in render.short_table(entries)
    assert "| SFPrompt | 1 of 2 | - | 9 |" in render.short_table(entries), "two of eleven were judged"
    far = record.merged([], [measured(ours=0.001, ours_std=0.0001)])
    assert "| holds |" in next(line for line in render.long_tables(far).splitlines() if CLAIM in line)


def test_day_and_commit_are_those_of_the_runs(tmp_path: Path) -> None:
    asked = Request(tmp_path, seeds=2, data="/data/cifar10", pairs=("rounds=4", "model.checkpoint=/home/me/w.pth"))
    wanted = [run for run in runs(BOARD, asked) if run.partition == "iid" and run.arm in ("sfprompt", "fedavg")]
    for number, run in enumerate(wanted):
        path = Path(run.config.out)
        path.mkdir()
        (path / "config.toml").write_text(
            f"# commit: {number % 2:012d}{'+' * (number % 2)}\n# machine: Linux x86_64\n" + to_toml(run.config.values)
        )
        (path / "summary.json").write_text("{}")
        os.utime(path / "summary.json", (86400 * number, 86400 * number))
    found = {
        "claim": CLAIM,
        "partition": "iid",
        "ours": 0.1,
        "ours_std": 0.0,
        "seeds": 2,
        "holds": False,
        "verdict": "no",
    }
    summaries = {run.name: work.finished(run) or {} for run in wanted}
    assert {its["machine"] for its in summaries.values()} == {"Linux x86_64"}
    (entry,) = record.entries(BOARD, asked, wanted, [found], summaries)
    assert (entry["date"], entry["commit"]) == ("1970-01-04", "0000000+")
    assert entry["data"] == "cifar10" and "4 rounds" in entry["scale"] and "50 devices" in entry["scale"]
    assert entry["command"] == (
        "python simulations/paper.py sfprompt --data cifar10 --seeds 2 --set rounds=4 --set model.checkpoint=w.pth"
    )


def test_what_only_shows_that_it_works_is_not_recorded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper, "scoreboards", lambda *_: pytest.fail("it began"))
    assert paper.main(["sfprompt", "--record", "--quick"]) == 2
    assert "--quick only shows" in capsys.readouterr().err


def test_recording_goes_through_the_command(
    pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of finished runs; a failed one keeps the paper's claims out."""
    summary = {"accuracy": 0.5, "client_flops": 10, "bytes_up": 5, "bytes_down": 5, "kept_samples": 1, "failures": 0}
    asked = Request(tmp_path, seeds=1, only="main")
    for run in runs(BOARD, asked):
        path = Path(run.config.out)
        path.mkdir()
        (path / "config.toml").write_text("# commit: abcdef012345\n" + to_toml(run.config.values))
        (path / "summary.json").write_text(json.dumps(summary))
    monkeypatch.setattr(record.write, "__defaults__", ((), pages))
    monkeypatch.setattr(kept, "REPOSITORY", pages)
    words = ["sfprompt", "--only", "main", "--seeds", "1", "--out", str(tmp_path), "--record"]
    before = (pages / "README.md").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(conduct, "run_all", lambda runs, jobs, say: ({}, {runs[0].name: "its disk is full"}))
        assert paper.main(words) == 1 and (pages / "README.md").read_text() == before
    assert not (pages / kept.FOLDER).exists()
    monkeypatch.setattr(work, "validate", lambda *_: None)
    assert paper.main(words) == 0
    shown = capsys.readouterr().out
    assert "recorded 11 claims in docs/scoreboard.json" in shown
    new = [entry for entry in record.read(pages) if entry["data"] == "digits"]
    assert len(new) == 11 and {entry["commit"] for entry in new} == {"abcdef0"}
    assert "python simulations/paper.py sfprompt --only main --seeds 1" in (pages / "docs/scoreboard.md").read_text()


@pytest.mark.parametrize("text", ["", render.BEGIN, render.END, 2 * (render.BEGIN + render.END)])
def test_a_page_without_a_place_is_told(text: str) -> None:
    with pytest.raises(FedsplitError, match=r"page\.md needs one '<!-- scoreboard -->'"):
        render.placed(text, "table", "page.md")
