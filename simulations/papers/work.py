"""Many training runs, each in a process and a folder of its own; what is already there is not run again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedsplit.runs import RunFolder
from fedsplit.sweep import folders, pool
from fedsplit.sweep.pool import Child
from fedsplit.sweep.work import Order, train
from fedsplit.types import FedsplitError, Scalar
from papers.figures import of_tables
from papers.scoreboard import Run

# Keys that change no figure of a finished run; the scoreboard itself says which rounds are tested.
ASIDE = (*folders.ASIDE, "eval.every")

# What is told of a run's origin, of the lines in the head of its config.toml.
HEAD = ("commit", "torch", "machine")

Summary = Mapping[str, Any]
Say = Callable[[str], None]


def validate(runs: Sequence[Run], say: Say) -> None:
    """Check that the runs can begin: folders, data, shards and cut, before anything is trained.

    Raises:
        FedsplitError: what is wrong with the first that cannot.
    """
    named: dict[str, Run] = {}
    for run in runs:
        other = named.setdefault(run.name, run)
        if deciding(other.config.values) != deciding(run.config.values):
            raise FedsplitError(f"Two papers ask for different runs of the name {run.name}; rename an arm of one.")
        finished(run)
    # Shards depend on partition and seed, the rest on the arm: one run of each tells for all.
    shards = {(run.partition, run.seed): run for run in reversed(runs)}
    arms = {run.arm: run for run in reversed(runs)}
    chosen = {run.name: run for run in (*shards.values(), *arms.values()) if not finished(run)}
    if chosen:
        say(f"checking {len(chosen)} configs and their shards")
    for number, run in enumerate(chosen.values()):
        try:
            folders.check(run.config, weights=not number)  # weights that cannot be had would fail in every run
        except FedsplitError as error:
            raise FedsplitError(f"{run.name}: {error}") from None


def carry_out(runs: Sequence[Run], jobs: int, say: Say) -> tuple[dict[str, Summary], dict[str, str]]:
    """Run what is not there yet, `jobs` at a time.

    Returns:
        The summaries, and why the others failed, by the runs' names.
    """
    unique = {run.name: run for run in runs}
    summaries = {name: summary for name, run in unique.items() if (summary := finished(run))}
    if summaries:
        say(f"{len(summaries)} of {len(unique)} runs are already there")
    left = [run for name, run in unique.items() if name not in summaries]
    failed: dict[str, str] = {}
    begun, total = time.monotonic(), len(left)
    with closing(pool.spread(left, jobs, start)) as children:
        for count, child in enumerate(filter(None, children), 1):
            name, error = child.run.name, child.ended()
            summary = None if error else finished(child.run)
            if summary is None:
                failed[name] = error or "it left no summary"
            else:
                summaries[name] = summary
            minutes = (time.monotonic() - begun) / count * (total - count) / 60
            state = f"[{len(summaries) + len(failed):>3} of {len(unique)}]"
            say(f"{state} {_line(child, summary, error)}  about {minutes:.1f} min left")
    return summaries, failed


def start(run: Run) -> Child:
    """Begin a run in a new process."""
    return pool.start(run, Order(run.name, dict(run.config.values)))


def finished(run: Run) -> Summary | None:
    """The summary of a run that is there, with what its tables add; None if it is still to be run, or to be ended.

    Raises:
        FedsplitError: its folder holds a run of another config.
    """
    summary = folders.summary(run.config, ASIDE)
    if summary is None:
        return None
    path = Path(run.config.out)
    return {**summary, **of_tables(*RunFolder.open(path)), **origin(path)}


def deciding(values: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The keys that decide the figures of a run of a scoreboard."""
    return folders.deciding(values, ASIDE)


def origin(path: Path) -> dict[str, str]:
    """The UTC day on which the run in folder `path` ended, and the commit, torch and machine that it names."""
    day = datetime.fromtimestamp((path / "summary.json").stat().st_mtime, UTC).date().isoformat()
    head = dict.fromkeys(HEAD, "")
    for line in (path / "config.toml").read_text(encoding="utf-8").splitlines():
        name, _, value = line.removeprefix("# ").partition(": ")
        if line.startswith("# ") and name in head:
            head[name] = value.strip()
    return {"date": day, **head}


def _line(child: Child, summary: Summary | None, error: str) -> str:
    seconds = f"{time.monotonic() - child.begun:.0f} s"
    if summary is None:
        return f"{child.run.name} failed after {seconds}: {error}"
    lost = f", {summary['failures']} client rounds failed" if summary["failures"] else ""
    return f"{child.run.name:<40} accuracy {100 * summary['accuracy']:5.1f} %  {seconds:>6}{lost}"


__all__ = ["Child", "carry_out", "deciding", "finished", "origin", "start", "train", "validate"]
