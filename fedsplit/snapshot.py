"""A run folder as it is at this moment, for whoever watches a run that is under way: any runtime, read only.

Every file may be missing, half written or cut short by a kill; what cannot be read is left out. It reads the ends of
long files alone, and needs neither the world of the run nor its process.
"""

from __future__ import annotations

import csv
import json
import math
import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from fedsplit.types import FedsplitError

TAIL_BYTES = 256 << 10
LIVE = ("open", "away", "expected")
FILES = ("config.toml", "rounds.csv", "clients.csv", "sessions.json", "events.jsonl", "summary.json")
ROUND = ("round", "accuracy", "train_loss", "clients", "failures", "bytes_up", "bytes_down", "wall_s")
CLIENT = ("round", "client", "samples", "steps", "train_loss", "wall_s", "failure")
SESSION = ("round_trips_per_s", "up_bytes", "down_bytes", "packets", "server_s", "silent_s")
Row = dict[str, Any]


def snapshot(folder: Path, last: int = 8) -> Row:
    """What `fedsplit watch` shows, as plain values: of rounds and events the `last` ones, of clients the last round's.

    `elapsed_s` counts from the beginning of the run folder, `silent_s` from the last change of any file; a run is
    `finished` when its summary is there, `failed` when its process said so and no other one went on with it.

    Raises:
        FedsplitError: there is no run at `folder`.
    """
    now_s = time.time()
    config = _config(folder)
    rounds = rows(folder / "rounds.csv", ROUND)
    clients = rows(folder / "clients.csv", CLIENT)
    events = lines(folder / "events.jsonl")
    summary = document(folder / "summary.json")
    wanted = config.get("rounds", 0)
    finished = bool(summary) and _number(summary.get("rounds")) >= wanted
    ends = [event for event in events if str(event.get("event", "")).startswith("run-")]
    failed = not finished and bool(ends) and ends[-1]["event"] == "run-failed"
    changed_s = {name: file.stat().st_mtime for name in FILES if (file := folder / name).is_file()}
    until_s = now_s if not (finished or failed) else max(changed_s.values())
    record = document(folder / "sessions.json")
    tested = [row for row in rounds if row["accuracy"] != ""]
    return {
        "run": str(folder),
        "name": config.get("name", ""),
        "round": rounds[-1]["round"] if rounds else 0,
        "rounds": wanted,
        "accuracy": tested[-1]["accuracy"] if tested else None,
        "elapsed_s": round(max(0.0, until_s - changed_s["config.toml"]), 1),
        "silent_s": round(max(0.0, now_s - max(changed_s.values())), 1),
        "finished": finished,
        "failed": failed,
        "sessions": _sessions(record, now_s if not (finished or failed) else None),
        "devices": _list(record, "devices"),
        "latest_rounds": rounds[-last:],
        "clients": [row for row in clients if row["round"] == clients[-1]["round"]],
        "events": events[-last:],
        "last_error": _last_error(events, clients),
    }


def rows(file: Path, names: Sequence[str]) -> list[Row]:
    """The whole rows at the end of a table, these columns alone; numbers as numbers, empty cells as ""."""
    text = _tail(file, header=True)
    found = []
    with suppress(csv.Error):
        for row in csv.DictReader(text.splitlines(keepends=True)):
            if None not in row and None not in row.values() and row.get("round", "").isdigit():
                found.append({name: _cell(row.get(name, "")) for name in names})
    return found


def lines(file: Path) -> list[Row]:
    """The events at the end of a file of JSON lines."""
    found = []
    for line in _tail(file).splitlines():
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("event"), str):
                found.append(entry)
    return found


def document(file: Path) -> Row:
    """A file that is one JSON object; empty if it is not, or not yet."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _config(folder: Path) -> Row:
    try:
        found = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except OSError:
        raise FedsplitError(f"{folder} is not a run folder: it has no config.toml that can be read.") from None
    except ValueError:
        raise FedsplitError(f"{folder} is not a run folder: its config.toml is no TOML.") from None
    return {"name": str(found.get("name", "")), "rounds": int(_number(found.get("rounds")))}


def _sessions(record: Row, now_s: float | None) -> list[Row]:
    """Sessions with what follows from their figures, those that live first; None: the run is over, time stands."""
    passed_s = 0.0
    with suppress(ValueError):
        written = datetime.fromisoformat(str(record.get("written", "")))
        passed_s = max(0.0, now_s - written.timestamp()) if now_s is not None else 0.0
    found = []
    for given in _list(record, "sessions"):
        row: Row = {name: given.get(name, "") for name in ("node", "client", "round", "state", "last_error")}
        row |= {name: _number(given.get(name)) for name in SESSION}
        lives = row["state"] in LIVE
        row["silent_s"] = round(row["silent_s"] + passed_s * lives, 1)
        size = (row["up_bytes"] + row["down_bytes"]) / max(1.0, row.pop("packets"))
        row["mb_per_s"] = round(row["round_trips_per_s"] * size / 1e6, 3)
        found.append(row)
    return [row for row in found if row["state"] in LIVE] + [row for row in found[::-1] if row["state"] not in LIVE]


def _last_error(events: Sequence[Row], clients: Sequence[Row]) -> Row | None:
    """The last failure that was told: when (round), who, and why."""
    for event in reversed(events):
        if event["event"] in ("client-failed", "session-dismissed", "run-failed") and event.get("reason"):
            return {name: event[name] for name in ("time", "event", "round", "client", "reason") if name in event}
    for row in reversed(clients):
        if row["failure"] != "":
            return {"round": row["round"], "client": row["client"], "reason": str(row["failure"])}
    return None


def _list(record: Mapping[str, Any], name: str) -> list[Row]:
    found = record.get(name)
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def _tail(file: Path, header: bool = False) -> str:
    """The last whole lines of a file, after its first one if that is a header."""
    try:
        with file.open("rb") as source:
            first = source.readline() if header else b""
            size = source.seek(0, 2)
            start = max(len(first), size - TAIL_BYTES)
            source.seek(max(0, start - 1))
            data = source.read()
    except OSError:
        return ""
    if start:  # from the byte before, so that a line that begins here is seen to begin
        data = data.partition(b"\n")[2]
    whole = data[: data.rfind(b"\n") + 1]
    return (first + whole).decode(errors="replace")


def _cell(text: str) -> Any:
    """A cell as the finite number that it is, if it is one."""
    for kind in (int, float):
        with suppress(ValueError):
            if math.isfinite(value := kind(text)):
                return value
    return text


def _number(value: Any) -> float:
    """A finite number, or 0."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else 0
