"""The run folder: what a run leaves behind, and how it goes on after it died.

config.toml        every key, resolved; versions, commit, seed and threads in its head
rounds.csv         a row a round          clients.csv   a row a client and round
ledger.csv         bytes by stream, and what they would be without codecs
classes.csv        accuracy by class      partition.csv   samples by device and class
units.csv          how often units of the model ran, where body.plans leaves some out
proof.csv          what the run began with, and its weights and ledger by round, as a chain of digests
choices.csv        what each controller chose a round, and what it brought
personal.csv       a row a device: its own model at the end (with eval.per-client)
summary.json       the figures            model.safetensors
checkpoint/        the state after the last rounds
tensorboard/       event files (with track=tensorboard)
clients/           what clients wrote down, and the server's notes on them: files that checkpoints refer to
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsplit import checkpoints
from fedsplit.checkpoints import sha256 as sha256
from fedsplit.config import Config, load, to_toml
from fedsplit.plugins import plugged
from fedsplit.round import State
from fedsplit.shelf import durable
from fedsplit.types import FedsplitError, Scalar, Tensors
from fedsplit.wire.frame import pack

TABLES = ("rounds", "clients", "ledger", "classes", "units", "choices", "proof")
PACKAGES = ("fedsplit", "torch", "timm", "numpy", "peft", "flwr", "ray", "safetensors")


@dataclass(frozen=True)
class RunFolder:
    """A folder of one run."""

    path: Path

    @classmethod
    def create(cls, config: Config, root: Path) -> RunFolder:
        """A new folder: key `out`, or `<root>/<time>-<name>`.

        Raises:
            FedsplitError: it exists and holds something, or cannot be written.
        """
        path = Path(config.out).expanduser() if config.out else fresh(root, config.name)
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise FedsplitError(
                    f"The run folder {path} exists and is not empty; "
                    f"choose another 'out', or go on with: fedsplit resume {path}"
                )
            (path / "checkpoint").mkdir(parents=True)
            cls(path).note(config)
        except OSError as error:
            raise FedsplitError(
                f"Cannot write the run folder {path}: {error.strerror}; set 'out' to a writable place."
            ) from None
        return cls(path.resolve())

    @classmethod
    def open(cls, path: str | Path) -> tuple[RunFolder, Config]:
        """An existing run and its config.

        Raises:
            FedsplitError: there is no run at `path`.
        """
        folder = Path(path).expanduser()
        if not (folder / "config.toml").is_file():
            raise FedsplitError(f"{folder} is not a run folder: it has no config.toml.")
        return cls(folder.resolve()), load([folder / "config.toml"])

    def note(self, config: Config) -> None:
        """Write `config` down as that of this run."""
        write(self.path / "config.toml", _head(config) + to_toml(config.values))

    def shelved(self, state: State) -> State:
        """`state` with what clients wrote down, and the notes on them, on disk."""
        return checkpoints.shelved(self.path, state)

    def save(self, state: State) -> None:
        """Write a checkpoint: complete under its final name, or not there at all."""
        checkpoints.save(self.path, state)

    def restore(self, first: State) -> State:
        """The state of the newest checkpoint, or `first`; rows of later rounds are dropped from the tables.

        Raises:
            FedsplitError: the checkpoint is damaged, or is not of a model with the parameters of `first`.
        """
        found = checkpoints.names(self.path)
        state = checkpoints.read(self.path, found[-1]) if found else self.shelved(first)
        if {k: v.shape for k, v in state.model.items()} != {k: v.shape for k, v in first.model.items()}:
            raise FedsplitError(
                f"The checkpoint {found[-1]} is not of the model in {self.path / 'config.toml'}; "
                "undo what was changed there since the run began."
            )
        checkpoints.tidy(self.path)
        for table in TABLES:
            self.trim(table, "round", state.round)
        return state

    def append(self, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows to `<table>.csv`, which keeps the columns that it has; no rows make no file."""
        if not rows:
            return
        file = self.path / f"{table}.csv"
        fresh = not file.exists() or not file.stat().st_size
        names = list(rows[0]) if fresh else self._columns(file)
        with file.open("a", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, fieldnames=names, restval="", extrasaction="ignore")
            if fresh:
                writer.writeheader()
            writer.writerows(rows)

    @staticmethod
    def _columns(file: Path) -> list[str]:
        """Those of the version that began the run, which may be an earlier one."""
        with file.open(newline="", encoding="utf-8") as source:
            return next(csv.reader(source))

    def table(self, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `<table>.csv` anew, with these rows alone."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        write(self.path / f"{table}.csv", text.getvalue())

    def rows(self, table: str) -> list[dict[str, str]]:
        """The rows of `<table>.csv`, as text; none if there is no such file."""
        file = self.path / f"{table}.csv"
        if not file.exists():
            return []
        with file.open(newline="", encoding="utf-8") as source:
            return list(csv.DictReader(source))

    def finish(self, summary: Mapping[str, Any], model: Tensors, metadata: dict[str, str] | None = None) -> None:
        """Write the model, with what its file says of it, and the summary, the summary last."""
        durable(self.path / "model.safetensors", pack(model, metadata))
        write(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    def trim(self, table: str, column: str, last: int) -> None:
        """Drop the rows of `<table>.csv` whose `column` is above `last`."""
        # A kill may have cut the last row short: its columns are then missing.
        whole = [row for row in self.rows(table) if None not in row.values()]
        rows = [row for row in whole if int(row[column]) <= last]
        file = self.path / f"{table}.csv"
        if file.exists() and not rows:
            file.unlink()
        elif rows:
            self.table(table, rows)


def sha256_text(text: str) -> str:
    """A digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def write(path: Path, text: str) -> None:
    """Write a small file: the old content or the new one, never half of it."""
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text(text, encoding="utf-8", newline="")
    os.replace(scratch, path)


def provenance(config: Config) -> dict[str, Scalar]:
    """Versions, commit, seed and threads of this process."""
    return {
        **{name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
        "seed": config.seed,
        "threads": config.threads,
        **({"pieces": own} if (own := plugged()) else {}),
    }


def version(package: str) -> str:
    """The installed version of a package, or 'absent'."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def commit() -> str:
    """The commit of the checkout that this package runs from, with '+' when files differ, or 'unknown'."""
    here = Path(__file__).parent
    try:
        name = _git(here, "rev-parse", "--short=12", "HEAD")
        return name + ("+" if _git(here, "status", "--porcelain", "--", str(here)) else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def totals(rows: Iterable[Mapping[str, str]], names: Sequence[str]) -> dict[str, float]:
    """Sums of columns over rows; whole numbers stay whole."""
    sums: dict[str, float] = dict.fromkeys(names, 0)
    for row in rows:
        for name in names:
            sums[name] += float(row[name]) if "." in row[name] or "e" in row[name] else int(row[name])
    return sums


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _head(config: Config) -> str:
    lines = [f"# {name}: {value}" for name, value in provenance(config).items()]
    return (
        "\n".join(
            ["# A resolved fedsplit config; run it again with: fedsplit run --config THIS_FILE --set out=''", *lines]
        )
        + "\n"
    )


def fresh(root: Path, name: str) -> Path:
    """A folder name that is not taken: `<root>/<time>-<name>`."""
    plain = re.sub(r"[^\w.-]+", "-", name)
    base = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{plain}"
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path
