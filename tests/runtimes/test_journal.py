"""The live record of a deployment: what is in it, when it is written, and that a disk that fails ends nothing."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alike import ROOT

sys.path.append(str(ROOT / "simulations"))

from drills.broken import TINY
from drills.streamed import devices

from fedsplit import experiment
from fedsplit.progress import Silent
from fedsplit.runtime import journal as journals
from fedsplit.runtime.device import work
from fedsplit.runtime.journal import Journal
from fedsplit.runtime.lines import keyed, peak_rss_bytes
from fedsplit.runtime.stream.session import Figures
from fedsplit.types import FedsplitError

FIGURES = Figures(7, 1, 2, "open", 3.0, 4, 500, 600, 10.0, 0.25, "", 0.5)
DEVICE = {"number": 1, "node": 7, "connected": True}


def events(folder: Path) -> list[dict[str, Any]]:
    """What is in events.jsonl, whole lines alone."""
    found = []
    file = folder / "events.jsonl"
    for line in file.read_text().split("\n")[:-1] if file.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def until(true: Callable[[], bool], within_s: float = 20.0) -> bool:
    """Wait for the journal's thread."""
    end_s = time.monotonic() + within_s
    while not true() and time.monotonic() < end_s:
        time.sleep(0.005)
    return true()


def test_events_are_written_at_once_and_none_from_before_the_folder_is_lost(tmp_path: Path) -> None:
    with Journal(every_s=60.0) as journal:
        journal.event("device-introduced", number=0)
        journal.open(tmp_path)
        journal.event("round-begun", round=1)
        assert until(lambda: len(events(tmp_path)) == 2), "while it is open: a kill loses nothing"
    first, second = events(tmp_path)
    assert (first["event"], first["number"], second["event"]) == ("device-introduced", 0, "round-begun")
    assert first["time"].endswith("Z") and first["time"] <= second["time"]


def test_sessions_are_written_when_they_change_and_not_because_time_passes(tmp_path: Path) -> None:
    now = [FIGURES]
    journal = Journal()
    journal.follow(lambda: now, lambda: [DEVICE])
    journal._folder = tmp_path
    journal._look()
    found = json.loads((tmp_path / "sessions.json").read_text())
    assert found["devices"] == [DEVICE] and found["sessions"][0]["up_bytes"] == 500
    (tmp_path / "sessions.json").unlink()
    now[0] = replace(FIGURES, since_s=4.0, silent_s=1.5)
    journal._look()
    assert not (tmp_path / "sessions.json").exists()
    now[0] = replace(FIGURES, packets=5)
    journal._look()
    assert json.loads((tmp_path / "sessions.json").read_text())["sessions"][0]["packets"] == 5


def test_a_disk_that_takes_nothing_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "not there"
    with caplog.at_level(logging.WARNING, "fedsplit"), Journal(every_s=0.01) as journal:
        journal.follow(lambda: [FIGURES])
        journal.open(folder)
        journal.event("round-begun", round=1)
        assert until(lambda: "cannot be written" in caplog.text)
        folder.mkdir()  # the disk is back
        assert until(lambda: (folder / "sessions.json").exists() and bool(events(folder)))
    assert caplog.text.count("cannot be written") == 1, "said once"
    assert [entry["event"] for entry in events(folder)] == ["round-begun"]


def test_half_a_line_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "a"}\n{"event": "cut sh')
    with Journal() as journal:
        journal.open(tmp_path)
        journal.event("b")
    assert [entry["event"] for entry in events(tmp_path)] == ["a", "b"]


def test_events_beyond_what_is_kept_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "MOST_WAITING", 3)
    with Journal() as journal:
        for number in range(5):
            journal.event("many", number=number)
        journal.open(tmp_path)
    assert [entry.get("number", entry.get("count")) for entry in events(tmp_path)] == [0, 1, 2, 2]


def test_a_run_that_fails_says_so(tmp_path: Path) -> None:
    with pytest.raises(FedsplitError), Journal() as journal:
        journal.open(tmp_path)
        raise FedsplitError("Below its\nquorum.")
    assert events(tmp_path)[-1]["reason"] == "FedsplitError: Below its quorum."


def test_a_run_over_the_stream_is_in_the_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens: list[bytes] = []

    def fails(*arguments: Any) -> Any:
        tokens.append(arguments[2].token)
        if arguments[1].client == 1 and arguments[1].round == 2:
            raise FedsplitError("No battery.")
        return work(*arguments)

    with Journal() as journal, devices({**TINY, "share.quorum": 0.0}, tmp_path, journal) as fleet:
        fleet.works = {(client, number): fails for client in (0, 1, 2) for number in (1, 2)}
        with caplog.at_level(logging.INFO, "fedsplit.runtime.device"):
            experiment.run(fleet.config, fleet, progress=journal.around(Silent()))
    run = tmp_path / "run"
    found = events(run)
    assert [entry["event"] for entry in found if "round" not in entry] == ["run-begun", "run-ended"]
    told = [entry["event"] for entry in found if entry.get("client") == 0 and entry.get("round") == 1]
    session = [name for name in told if name != "session-lost"]  # the stream of a session that is done may end first
    assert session == [
        *("session-expected", "session-opened", "session-done", "session-dismissed", "client-done")
    ]  # fmt: skip
    failed = [entry for entry in found if entry["event"] == "client-failed"]
    assert [(entry["client"], entry["round"], entry["reason"]) for entry in failed] == [
        (1, 2, "FedsplitError: No battery.")
    ]
    ended = [entry for entry in found if entry["event"] == "round-ended"]
    assert [(entry["round"], entry["clients"], entry["failures"]) for entry in ended] == [(1, 3, 0), (2, 2, 1)]
    states = [row["state"] for row in json.loads((run / "sessions.json").read_text())["sessions"]]
    assert states == ["gone"] * 6
    written = (run / "events.jsonl").read_bytes() + (run / "sessions.json").read_bytes()
    assert len(tokens) == 6
    for token in tokens:
        assert not any(form.encode() in written for form in (token.hex(), str(token)))
    lines = [record.getMessage() for record in caplog.records if record.name == "fedsplit.runtime.device"]
    assert len(lines) == 5 and lines[0].startswith("event=round-done client=0 round=1 steps=")
    facts = dict(pair.split("=") for pair in lines[0].split())
    assert int(facts["bytes_up"]) > 0 and int(facts["bytes_down"]) > 0 and int(facts["peak_rss_bytes"]) > 10**7


def test_a_line_of_the_log_is_key_and_value() -> None:
    assert keyed("x", client=3, seconds=1.5, why='a "b"', file="a/b.c") == (
        'event=x client=3 seconds=1.500 why="a \\"b\\"" file=a/b.c'
    )
    assert peak_rss_bytes() > 10**7
