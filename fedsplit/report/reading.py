"""Run folders as they are: of any version, finished or not, read only.

Nothing here checks keys or columns against those of today: what a folder lacks is absent, and who needs it says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedsplit.config import read_toml
from fedsplit.report.table import Table, read_table
from fedsplit.types import FedsplitError


class Absent(FedsplitError):
    """A figure that does not apply to a run; the message is one sentence that says why."""


@dataclass(frozen=True)
class Run:
    """A run folder: its config and tables, read when they are first asked for.

    `config` has the keys as that version wrote them, `about` the versions, commit, seed and threads of its head.
    """

    path: Path
    config: Mapping[str, Any]
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The config's name, or the folder's."""
        return str(self.config.get("name") or self.path.name)

    @property
    def finished(self) -> bool:
        """Whether the run ended: its summary is the last that it writes."""
        return bool(self.summary)

    @cached_property
    def rounds(self) -> Table:
        """A row a round."""
        table = read_table(self.path / "rounds.csv")
        if table and "round" not in table:
            raise FedsplitError(f"{self.path / 'rounds.csv'} has no column 'round': fedsplit did not write it.")
        return table

    @cached_property
    def clients(self) -> Table:
        """A row a client and round."""
        return read_table(self.path / "clients.csv")

    @cached_property
    def classes(self) -> Table:
        """A row a class and tested round: accuracy."""
        return read_table(self.path / "classes.csv")

    @cached_property
    def ledger(self) -> Table:
        """A row a round: bytes by stream, and what they would be without codecs."""
        return read_table(self.path / "ledger.csv")

    @cached_property
    def units(self) -> Table:
        """A row a round, block and unit: steps in full, forward only, skipped."""
        return read_table(self.path / "units.csv")

    @cached_property
    def choices(self) -> Table:
        """What controllers chose: a row a round and group or client."""
        return read_table(self.path / "choices.csv")

    @cached_property
    def partition(self) -> Table:
        """A row a device and class that it holds: samples."""
        return read_table(self.path / "partition.csv")

    @cached_property
    def personal(self) -> Table:
        """A row a device: accuracy of its own model on its held-out samples."""
        return read_table(self.path / "personal.csv")

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json; empty while the run goes on."""
        return read_json(self.path / "summary.json")

    @cached_property
    def audit(self) -> dict[str, Any]:
        """audit/audit.json; empty where the run was not audited in its own folder."""
        return read_json(self.path / "audit" / "audit.json")

    def file(self, name: str) -> Path | None:
        """A file of the folder, such as "audit/audit.png"; None where it is not there."""
        file = self.path / name
        return file if file.is_file() else None

    def figure(self, name: str) -> float | None:
        """A figure of the summary; while there is none, of the rounds so far, sums but for accuracy and loss."""
        value = self.summary.get(name)
        if isinstance(value, int | float):
            return float(value)
        if name == "rounds":
            return float(self.rounds.count)
        if self.finished or name not in self.rounds:
            return None
        there = self.rounds.numbers(name)
        there = there[np.isfinite(there)]
        if not len(there):
            return None
        return float(there[-1] if name in ("accuracy", "loss") else there.sum())


def load(path: str | Path) -> Run:
    """The run in folder `path`, of this version of fedsplit or an earlier one.

    Raises:
        FedsplitError: it is no run folder, or its config cannot be read.
    """
    folder = Path(path).expanduser()
    if not (folder / "config.toml").is_file():
        what = "has no config.toml" if folder.is_dir() else "is no folder"
        raise FedsplitError(f"{folder} is not a run folder: it {what}.")
    return Run(folder.resolve(), read_toml(folder / "config.toml"), _about(folder / "config.toml"))


def load_all(paths: Sequence[str | Path]) -> list[Run]:
    """The runs in `paths`, each once; a folder of run folders (a study) stands for all in it, in order of their names.

    Raises:
        FedsplitError: as `load`, or a folder that holds no run at all.
    """
    found: dict[Path, Run] = {}
    for path in paths:
        folder = Path(path).expanduser()
        inner: list[Path] = []
        if folder.is_dir() and not (folder / "config.toml").is_file():
            depths = (folder.glob("*/config.toml"), folder.glob("*/*/config.toml"))
            inner = sorted(file.parent for files in depths for file in files if (file.parent / "rounds.csv").is_file())
        for each in inner or [folder]:
            run = load(each)
            found.setdefault(run.path, run)
    return list(found.values())


def read_json(file: Path) -> dict[str, Any]:
    """A JSON document; empty where there is none, or none that can be read."""
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _about(file: Path) -> dict[str, str]:
    """`name: value` lines of the comments at the head of a config.toml."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        name, colon, value = line.removeprefix("#").strip().partition(": ")
        if colon and " " not in name:
            found[name] = value
    return found
