"""Runs that are kept: a scoreboard measured in parts has the tables of one measured at once."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsplit.config import to_toml

sys.path.append(str(Path(__file__).resolve().parents[1] / "simulations"))

import all as combination
import paper
from papers import PAPERS, conduct, kept, scoreboard, work
from papers.figures import Results, claimed_on, judge

BOARD = PAPERS["sfprompt"]
WORDS = ("sfprompt", "--only", "main", "--arms", "sfprompt,splitfed")


def asked(out: Path, **changes: Any) -> scoreboard.Request:
    return replace(scoreboard.Request(out, seeds=1, only="main", arms=("sfprompt", "splitfed")), **changes)


def leave(out: Path, seed: int) -> list[scoreboard.Run]:
    """The folders of the finished runs of a seed."""
    runs = [run for run in scoreboard.runs(BOARD, asked(out, seeds=seed + 1)) if run.seed == seed]
    for number, run in enumerate(runs):
        path = Path(run.config.out)
        path.mkdir(parents=True)
        (path / "config.toml").write_text(
            f"# commit: {seed:012d}\n# machine: Linux x86_64\n" + to_toml(run.config.values)
        )
        summary = {"accuracy": 0.3 + (number + seed) / 10, "client_flops": 10 + number, "bytes_up": 5, "bytes_down": 5}
        (path / "summary.json").write_text(json.dumps(summary | {"kept_samples": 1, "failures": 0}))
    return runs


def printed(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    shown = capsys.readouterr().out
    found = json.loads(shown.strip().splitlines()[-1])
    return {name: found[name] for name in ("rows", "claims")}, shown


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of its own; nothing can be trained."""
    monkeypatch.setattr(kept, "REPOSITORY", tmp_path)
    monkeypatch.setattr(paper.record, "write", lambda entries: None)
    monkeypatch.setattr(work, "validate", lambda *_: None)
    monkeypatch.setattr(work, "start", lambda run: pytest.fail(f"{run.name} began"))
    return tmp_path


def test_seeds_of_two_places_make_the_tables_of_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, place in enumerate(("one", "two")):
        leave(here / place, seed)
        leave(here / "both", seed)
    assert paper.main([*WORDS, "--seeds", "2", "--out", str(here / "both")]) == 0
    whole, _ = printed(capsys)
    assert paper.main([*WORDS, "--seeds", "1", "--out", str(here / "one"), "--record"]) == 0
    assert "9 runs are kept in docs/measured/sfprompt.jsonl" in printed(capsys)[1]
    assert paper.main([*WORDS, "--seeds", "2", "--out", str(here / "two"), "--known", "--record"]) == 0
    parts, shown = printed(capsys)
    assert parts == whole and {row["seeds"] for row in parts["rows"]} == {2}
    assert "9 of 18 runs were already there; 9 of 18 are known from docs/measured (0000000)" in " ".join(shown.split())
    assert paper.main([*WORDS, "--seeds", "2", "--out", str(here / "three"), "--known"]) == 0
    assert printed(capsys)[0] == whole and not list((here / "three").glob("*-s*"))


def test_a_run_of_another_config_is_not_known(here: Path) -> None:
    runs = leave(here / "one", 0)
    summaries = {run.name: work.finished(run) or {} for run in runs}
    assert kept.write("sfprompt", runs, summaries) == len(runs) == 9
    elsewhere = scoreboard.runs(BOARD, asked(here / "elsewhere"))
    assert kept.known("sfprompt", elsewhere) == summaries
    for change in ({"pairs": ("rounds=3",)}, {"data": "/data/cifar10"}, {"model": "fedsplit_tiny"}):
        assert not kept.known("sfprompt", scoreboard.runs(BOARD, asked(here, **change))), change
    assert not kept.known("sfprompt", [replace(run, audit=("audit.victims=3",)) for run in elsewhere])
    engine = scoreboard.runs(BOARD, asked(here, pairs=("engine.workers=2",)))
    assert len(kept.known("sfprompt", engine)) == 9, "the engine changes no figure"
    again = {run.name: {**summaries[run.name], "accuracy": 0.9} for run in runs[:1]}
    assert kept.write("sfprompt", runs, again) == 1
    assert [its["accuracy"] == 0.9 for its in kept.known("sfprompt", runs).values()].count(True) == 1
    assert len(kept.read("sfprompt")) == 9


def test_folders_count_by_name_and_a_front_by_its_hardening(tmp_path: Path) -> None:
    def front(public: str, out: str, *pairs: str) -> dict[str, Any]:
        wanted = scoreboard.Request(Path(out), seeds=1, data="/some/where/cifar10", pairs=pairs)
        run = next(run for run in scoreboard.runs(combination.board(public), wanted) if run.arm == "all")
        return kept.identity(run)

    one = front("/here/tiny", "/a")
    assert one == front("/there/tiny", "/b") and "/" not in json.dumps(one)
    assert one["keys"]["data.source"] == "cifar10" and one["hardening"]["data.source"] == "tiny"
    assert one != front("/here/large", "/a") and one["audit"] == ["audit.victims=32"]


def test_a_file_that_cannot_be_read_is_one_sentence(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kept.read("sfprompt") == []
    (here / kept.FOLDER).mkdir(parents=True)
    (here / kept.FOLDER / "sfprompt.jsonl").write_text('{"run": "a"}\n')
    assert paper.main([*WORDS, "--seeds", "1", "--out", str(here / "one"), "--known"]) == 2
    shown = capsys.readouterr()
    assert "has a line that is no run (KeyError); mend it, or leave out --known" in shown.err and not shown.out


def test_failed_runs_are_not_kept(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = leave(here / "one", 0)[0]
    kept_one = {first.name: work.finished(first)}
    monkeypatch.setattr(conduct, "run_all", lambda runs, jobs, say: (dict(kept_one), {runs[1].name: "disk full"}))
    assert paper.main([*WORDS, "--seeds", "1", "--out", str(here / "one"), "--record"]) == 1
    assert [line["run"] for line in kept.read("sfprompt")] == [first.name]


@pytest.mark.parametrize("file", sorted((kept.REPOSITORY / kept.FOLDER).glob("*.jsonl")), ids=lambda file: file.stem)
def test_what_is_kept_names_no_machine_and_says_what_the_scoreboard_says(file: Path, tmp_path: Path) -> None:
    """Claims of docs/scoreboard.json whose runs are all kept are judged again, of the kept runs alone."""
    text = file.read_text(encoding="utf-8")
    assert ': "/' not in text and "/tmp" not in text and "/home" not in text
    lines = kept.read(file.stem)
    assert len({line["run"] + json.dumps(line["identity"]["keys"]) for line in lines}) == len(lines)
    assert all(line["summary"]["commit"] and line["summary"]["date"] for line in lines)
    board = PAPERS.get(file.stem)
    for entry in paper.record.read() if board else ():
        if board is None or entry["method"] != board.name or not entry["data"]:
            continue
        options = paper.parser().parse_args(entry["command"].split()[2:])
        request = scoreboard.Request(
            tmp_path,
            entry["seeds"],
            False,
            options.only,
            f"/data/{entry['data']}",
            options.model,
            "cpu",
            tuple(options.set),
        )
        runs = scoreboard.runs(board, request)
        results = Results.of(board, runs, kept.known(board.name, runs))
        claim = next(claim for claim in board.claims if claim.text == entry["claim"])
        for partition in claimed_on(claim, scoreboard.main_cells(board, request)):
            found = judge(board, claim, results, partition, request.model)
            if board.partition(partition).title == entry["partition"] and found["seeds"] == entry["seeds"]:
                assert found["ours"] == entry["ours"], (entry["claim"], partition)
