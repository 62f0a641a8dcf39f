"""Processes that a block of code starts, directly or through others, and that must not outlive it."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

MARK = "FEDSPLIT_RUN_MARK"


@contextmanager
def no_process_left() -> Iterator[str]:
    """A mark for the environment of processes; whoever carries it, and its children, is gone afterwards."""
    mark = uuid.uuid4().hex
    main_thread = threading.current_thread() is threading.main_thread()
    old = signal.getsignal(signal.SIGTERM)
    if main_thread:
        signal.signal(signal.SIGTERM, _leave)
    try:
        yield mark
    finally:
        handlers = {}
        if main_thread:
            # A second Ctrl-C must not stop the cleaning.
            handlers = {one: signal.signal(one, signal.SIG_IGN) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            _kill(mark)
        finally:
            for one, handler in {**handlers, signal.SIGTERM: old}.items():
                if main_thread:
                    signal.signal(one, handler)


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _kill(mark: str) -> None:
    """End all marked processes: stop them first, so that none starts another one meanwhile."""
    found: dict[int, psutil.Process] = {}
    while fresh := [one for one in _marked(mark) if one.pid not in found]:
        for one in fresh:
            found[one.pid] = one
            with suppress(psutil.Error):
                one.suspend()
    for one in found.values():
        with suppress(psutil.Error):
            one.kill()
    deadline = time.monotonic() + 10
    while any(map(_alive, found.values())) and time.monotonic() < deadline:
        time.sleep(0.05)
    for one in found.values():
        with suppress(psutil.Error):
            if one.ppid() == os.getpid():
                one.wait(timeout=1)


def _alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                yield process
                # Ray's workers write their title over their environment.
                yield from process.children(recursive=True)
