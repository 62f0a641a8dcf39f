"""The probe: a small Flower app that says what its clients answered, for runs under a SuperLink."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).parent / "probe"
ENV = {"PYTHONPATH": str(ROOT)}


def processes_in(folder: Path) -> list[str]:
    """Command lines of the living processes that work in a folder; Ray's workers hide all else."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(folder):
                found.append(" ".join(process.cmdline()))
    return found
