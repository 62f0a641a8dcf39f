"""`fedsplit watch`: what a frame shows, of which runs, and that no file in whatever state upsets it."""

from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from fedsplit.cli import watch
from fedsplit.cli.main import main
from fedsplit.snapshot import TAIL_BYTES, rows, snapshot

ROUNDS = """round,accuracy,train_loss,clients,failures,bytes_up,bytes_down,wall_s
1,0.25,2.1,2,0,1000000,2000000,3.5
2,,1.9,1,1,1000000,2000000,3.25
"""
CLIENTS = """round,client,samples,steps,train_loss,wall_s,failure
1,0,30,4,2.1,1.5,
2,0,30,4,1.9,1.25,
2,1,,,,,"No [red]battery[/red]."
"""
SESSION = {
    **{"node": 11, "client": 5, "round": 3, "state": "open", "seconds": 9.0, "silent_s": 0.5, "packets": 10},
    **{"up_bytes": 3_000_000, "down_bytes": 1_000_000, "round_trips_per_s": 5.0, "server_s": 1.5, "last_error": ""},
}
RECORD = {
    "written": "2026-01-01T00:00:00.000Z",
    "sessions": [{**SESSION, "client": 6, "state": "gone"}, SESSION],
    "devices": [{"number": 0, "node": 11, "connected": True}, {"number": 1, "node": 12, "connected": False}],
}
EVENTS: list[dict[str, Any]] = [
    {"time": "2026-01-01T10:00:00.000Z", "event": "run-begun", "rounds": 4, "done": 0},
    {"time": "2026-01-01T10:00:01.000Z", "event": "session-opened", "node": 11, "client": 5, "round": 3},
    {"time": "2026-01-01T10:00:02.000Z", "event": "client-failed", "client": 6, "round": 3, "reason": "\x1b[2Jgone"},
]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A run in one process, two of four rounds done."""
    (tmp_path / "config.toml").write_text('name = "demo"\nrounds = 4\n')
    (tmp_path / "rounds.csv").write_text(ROUNDS)
    (tmp_path / "clients.csv").write_text(CLIENTS)
    return tmp_path


@pytest.fixture
def deployed(plain: Path) -> Path:
    """The same on devices."""
    (plain / "sessions.json").write_text(json.dumps(RECORD))
    (plain / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    return plain


def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *command: str) -> str:
    """What a command prints."""
    monkeypatch.setenv("COLUMNS", "160")
    capsys.readouterr()
    assert main(["watch", *command]) == 0
    return capsys.readouterr().out


def test_a_run_without_sessions(
    plain: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shown(capsys, monkeypatch, str(plain), "--once")
    assert "demo  round 2 of 4  accuracy 25.0 %" in out
    assert "clients of round 2" in out and "last error: client 1, round 2: No [red]battery[/red]." in out
    assert "sessions" not in out


def test_a_deployment(deployed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = shown(capsys, monkeypatch, str(deployed), "--once")
    assert "1 of 2 devices connected; not: 1" in out
    cells = [part.strip() for part in next(line for line in out.splitlines() if " open " in line).split("│")[1:-1]]
    assert cells[:9] == ["11", "5", "3", "open", "5.0", "3.00", "1.00", "2.00", "1.5"]
    assert out.index(" open ") < out.index(" gone "), "those that live come first"
    assert "10:00:01  session-opened" in out
    assert "last error: client 6, round 3:  [2Jgone" in out and "\x1b" not in out, "no control codes of a device's"


def test_json_is_what_is_shown(
    deployed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = json.loads(shown(capsys, monkeypatch, str(deployed), "--json"))
    assert (found["round"], found["rounds"], found["accuracy"]) == (2, 4, 0.25)
    assert (found["finished"], found["failed"]) == (False, False)
    live, gone = found["sessions"]
    assert (live["client"], live["mb_per_s"], gone["client"], gone["silent_s"]) == (5, 2.0, 6, 0.5)
    assert live["silent_s"] > 1e6, "it counts on after the file was written"
    assert [event["event"] for event in found["events"]] == [event["event"] for event in EVENTS]
    assert [row["client"] for row in found["clients"]] == [0, 1]


def test_it_ends_with_the_run(deployed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "EVERY_S", 0.01)
    summary = deployed / "summary.json"
    summary.write_text('{"rounds": 2}')  # of before the run was told to go on to 4
    ended: list[int] = []
    watching = threading.Thread(target=lambda: ended.append(main(["watch", str(deployed)])), daemon=True)
    watching.start()
    watching.join(0.3)
    assert not ended
    os.replace(_new(deployed / "new.json", '{"rounds": 4}'), summary)
    watching.join(20.0)
    assert ended == [0]


def test_a_run_that_failed(deployed: Path) -> None:
    failed = {"time": "2026-01-01T10:00:03.000Z", "event": "run-failed", "reason": "FedsplitError: below"}
    with (deployed / "events.jsonl").open("a") as out:
        out.write(json.dumps(failed) + "\n")
    assert main(["watch", str(deployed)]) == 1
    with (deployed / "events.jsonl").open("a") as out:
        out.write(json.dumps(EVENTS[0]) + "\n")
    assert not snapshot(deployed)["failed"], "it was resumed"


def test_interrupted(plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", stop)
    assert main(["watch", str(plain)]) == 130
    assert "stopped" in capsys.readouterr().err


def test_not_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_files_cut_anywhere(deployed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from fedsplit.cli.frame import frame

    console = Console(file=io.StringIO(), width=120)
    for name in ("rounds.csv", "clients.csv", "sessions.json", "events.jsonl"):
        whole = (deployed / name).read_bytes()
        for end in range(0, len(whole), 5):
            (deployed / name).write_bytes(whole[:end])
            found = snapshot(deployed)
            assert found["round"] in (0, 1, 2), "a number cut short is not another number"
            if end % 3 == 0:
                console.print(frame(found))
        (deployed / name).write_bytes(b"\x00\xff{[,\n" * 3)
        console.print(frame(snapshot(deployed)))
        (deployed / name).write_bytes(whole)


def test_only_the_end_of_a_long_table_is_read(tmp_path: Path) -> None:
    file = tmp_path / "clients.csv"
    count = TAIL_BYTES // 10
    file.write_text("round,client\n" + "".join(f"{number:08d},{number:08d}\n" for number in range(1, count)))
    found = rows(file, ("round", "client"))
    assert 0 < len(found) < count - 1 and found[-1]["round"] == count - 1
    numbers = [row["round"] for row in found]
    assert numbers == list(range(numbers[0], count))


def _new(file: Path, text: str) -> Path:
    file.write_text(text)
    return file
