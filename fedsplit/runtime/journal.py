"""The live record of a deployment in its run folder: `sessions.json`, as it is now, and `events.jsonl`, what happened.

A thread of its own writes both, so that neither a slow disk nor a full one is felt by the sessions or ends the run.
Tokens are never written: what is recorded is `Figures`, `Event` and the run's own progress, none of which has one.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fedsplit.progress import Progress
from fedsplit.runs import RunFolder, write
from fedsplit.runtime.stream.session import Event, Figures
from fedsplit.types import Failure, Update

if TYPE_CHECKING:
    from fedsplit.world import World

SESSIONS, EVENTS = "sessions.json", "events.jsonl"
EVERY_S = 1.0
MOST_WAITING = 10_000
"""Events kept for a disk that takes none; what happens beyond them is counted alone."""
PASSING = ("seconds", "silent_s")
"""What changes in a session because time passes."""
log = logging.getLogger(__name__)
Devices = Callable[[], Sequence[Mapping[str, Any]]]


class Journal:
    """Events from any thread, and a look at sessions and devices every `every_s` seconds, for one run.

    Nothing is written before `open` says where; what happened until then is not lost.
    """

    def __init__(self, every_s: float = EVERY_S) -> None:
        self._every_s = every_s
        self._sessions: Callable[[], Sequence[Figures]] = tuple
        self._devices: Devices = tuple
        self._waiting: deque[str] = deque()
        self._missed = 0
        self._wake, self._closed = threading.Event(), False
        self._thread: threading.Thread | None = None
        self._folder = Path()
        self._torn = self._failing = False
        self._seen: Any = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is not None:
            self.event("run-failed", reason=_one_line(f"{type(value).__name__}: {value}"))
        self.close()

    def follow(self, sessions: Callable[[], Sequence[Figures]], devices: Devices = tuple) -> None:
        """Whom to ask for sessions and devices; both are called from the journal's thread."""
        self._sessions, self._devices = sessions, devices

    def event(self, what: str, **facts: Any) -> None:
        """Something happened; returns at once, and never fails."""
        if len(self._waiting) >= MOST_WAITING:
            self._missed += 1
            return
        self._waiting.append(_line(what, facts))
        self._wake.set()

    def session(self, event: Event) -> None:
        """What a `StreamServer` tells of a session."""
        facts = {name: value for name, value in asdict(event).items() if name != "what" and value != ""}
        self.event(f"session-{event.what}", **facts)

    def open(self, folder: Path) -> None:
        """Write into `folder` from now on."""
        if self._thread is not None:
            return
        self._folder = folder
        self._thread = threading.Thread(target=self._work, name="fedsplit-journal", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what there is, and end."""
        self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=10.0)  # a disk that hangs may keep it

    def around(self, inner: Progress) -> Noted:
        """A progress that tells `inner`, and this journal."""
        return Noted(inner, self)

    # In the journal's thread

    def _work(self) -> None:
        due_s = 0.0
        while True:
            self._wake.wait(max(0.0, due_s - time.monotonic()))
            last = self._closed
            self._wake.clear()
            try:
                self._drain()
                if last or time.monotonic() >= due_s:
                    due_s = time.monotonic() + self._every_s
                    self._look()
                self._failing = False
            except Exception as error:  # whatever it is, the run goes on
                if not self._failing:
                    log.warning("the live record in %s cannot be written: %s", self._folder, error)
                self._failing, due_s = True, time.monotonic() + self._every_s
                if not last:
                    time.sleep(min(self._every_s, 0.2))
            if last:
                return

    def _drain(self) -> None:
        """Write the events that wait, each with one call, so that what is written survives a kill."""
        if not self._waiting and not self._missed:
            return
        file = self._folder / EVENTS
        # A line that was cut short, by a kill or a full disk, must not swallow the next one.
        torn = self._torn or not _ends_well(file)
        with file.open("ab", buffering=0) as out:
            while self._waiting or self._missed:
                text = self._waiting[0] if self._waiting else _line("events-missed", {"count": self._missed})
                data = ("\n" * torn + text).encode()
                self._torn = torn = True
                if out.write(data) != len(data):
                    raise OSError("the disk took half a line")
                self._torn = torn = False
                if self._waiting:
                    self._waiting.popleft()
                else:
                    self._missed = 0

    def _look(self) -> None:
        sessions = [_shown(figures) for figures in self._sessions()]
        devices = [dict(device) for device in self._devices()]
        seen = ([{k: v for k, v in row.items() if k not in PASSING} for row in sessions], devices)
        if seen != self._seen:
            found = {"written": _now(), "sessions": sessions, "devices": devices}
            write(self._folder / SESSIONS, json.dumps(found) + "\n")
            self._seen = seen


class Noted:
    """A `Progress` that notes in a journal what it passes on; the run folder becomes known here."""

    def __init__(self, inner: Progress, journal: Journal) -> None:
        self._inner, self._journal, self._number = inner, journal, 0

    def begin(self, world: World, folder: RunFolder, done: int) -> None:
        """The run's folder is there."""
        self._journal.open(folder.path)
        self._journal.event("run-begun", rounds=world.config.rounds, done=done)
        self._inner.begin(world, folder, done)

    def round(self, number: int, clients: int) -> None:
        """A round, or its repetition."""
        self._number = number
        self._journal.event("round-begun", round=number, clients=clients)
        self._inner.round(number, clients)

    def heard(self, result: Update | Failure) -> None:
        """A client."""
        if isinstance(result, Failure):
            self._journal.event(
                "client-failed", client=result.client, round=self._number, reason=_one_line(result.reason)
            )
        else:
            steps, wall_s = result.report.steps, round(result.report.wall_s, 3)
            self._journal.event("client-done", client=result.client, round=self._number, steps=steps, wall_s=wall_s)
        self._inner.heard(result)

    def row(self, row: Mapping[str, Any]) -> None:
        """A round is over."""
        names = ("round", "accuracy", "clients", "failures", "wall_s")
        self._journal.event("round-ended", **{name: row[name] for name in names if row.get(name, "") != ""})
        self._inner.row(row)

    def note(self, text: str) -> None:
        """Passed on: rounds and clients are noted as such."""
        self._inner.note(text)

    def end(self, summary: Mapping[str, Any], folder: RunFolder) -> None:
        """The run is over."""
        self._journal.event("run-ended", accuracy=summary.get("accuracy"))
        self._inner.end(summary, folder)


def _shown(figures: Figures) -> dict[str, Any]:
    return {
        "node": figures.node,
        "client": figures.client,
        "round": figures.round,
        "state": figures.state,
        "seconds": round(figures.since_s, 1),
        "silent_s": round(figures.silent_s, 1),
        "packets": figures.packets,
        "up_bytes": figures.up_bytes,
        "down_bytes": figures.down_bytes,
        "round_trips_per_s": round(figures.round_trips_per_s, 1),
        "server_s": round(figures.server_s, 3),
        "last_error": figures.last_error,
    }


def _line(what: str, facts: Mapping[str, Any]) -> str:
    return json.dumps({"time": _now(), "event": what, **facts}, default=str) + "\n"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _ends_well(file: Path) -> bool:
    """Whether a file of lines is empty, absent, or ends with a line's end."""
    try:
        with file.open("rb") as found:
            if not found.seek(0, 2):
                return True
            found.seek(-1, 2)
            return found.read(1) == b"\n"
    except FileNotFoundError:
        return True
