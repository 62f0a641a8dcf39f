"""A sweep from its first check to its table: what is there is taken, what is not is run."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fedsplit.runs import write
from fedsplit.sweep import folders, table
from fedsplit.sweep.pool import Crew, Ended
from fedsplit.sweep.study import Run, Study
from fedsplit.sweep.work import Order
from fedsplit.types import FedsplitError

LOGS = "logs"


class Watch(Protocol):
    """Who follows a sweep."""

    def checking(self, done: int, total: int) -> None:
        """So many of the configs are checked."""

    def begin(self, there: int, total: int) -> None:
        """`there` of all runs are finished already."""

    def ended(self, ended: Ended, row: Mapping[str, Any] | None) -> None:
        """A run is over; its row of the table, if it did not fail."""

    def state(self, done: int, total: int, left_s: float | None) -> None:
        """How far it is, and about how many seconds are left; None where nothing tells yet."""


@dataclass(frozen=True)
class Result:
    """The rows of the finished runs, and why the others failed, by name."""

    rows: tuple[table.Row, ...]
    failed: Mapping[str, str]


@dataclass
class Pace:
    """What is left by what was done since `begun` seconds: rounds, weighed by their samples."""

    runs: Sequence[Run]
    begun: float
    first: Mapping[str, float]

    def left_s(self, over: Container[str], now: float) -> float | None:
        """About how many seconds are left; None where nothing has been done. `over` are the runs that have ended."""
        at = {run.name: 1.0 if run.name in over else _part(run) for run in self.runs}
        done = sum(effort(run) * (at[run.name] - self.first[run.name]) for run in self.runs)
        left = sum(effort(run) * (1.0 - at[run.name]) for run in self.runs)
        return left * (now - self.begun) / done if done > 0 else None


def check(runs: Sequence[Run], watch: Watch) -> dict[str, Mapping[str, Any]]:
    """Check that every run can begin, and that what is there is of the study; returns the finished runs' summaries.

    Data are dealt by the seed, all else is the same for all seeds of a point: these are checked once.

    Raises:
        FedsplitError: what is wrong with the first that cannot begin, with its name.
    """
    table.check()
    found, wanted, models = {}, dict[Any, Run](), dict[Any, str]()
    for run in runs:
        summary = folders.summary(run.config)
        if summary is not None:
            found[run.name] = summary
            continue
        dealt = tuple(item for item in run.config.values.items() if item[0].startswith(("data.", "devices.")))
        wanted.setdefault((tuple(run.point.values()),), run)
        wanted.setdefault((dealt, run.seed), run)
    once = list({run.name: run for run in wanted.values()}.values())
    for number, run in enumerate(once, 1):
        model = tuple(item for item in run.config.values.items() if item[0].startswith("model."))
        try:  # weights that cannot be had would fail in every run
            folders.check(run.config, weights=models.setdefault(model, run.name) == run.name)
        except FedsplitError as error:
            raise FedsplitError(f"{run.name}: {error}") from None
        watch.checking(number, len(once))
    return found


def sweep(
    study: Study, runs: Sequence[Run], there: Mapping[str, Mapping[str, Any]], out: Path, crew: Crew, watch: Watch
) -> Result:
    """Run what is not there yet; the table is written anew after every run. `there` is what `check` found.

    Raises:
        FedsplitError: another sweep is at work in `out`, or it cannot be written.
    """
    with _alone(out):
        write(out / "study.toml", study.text)
        by_name = {run.name: run for run in runs}
        rows = {name: table.row(by_name[name], summary) for name, summary in there.items()}
        over = dict.fromkeys(name for name in rows if not by_name[name].audit or table.attacked(by_name[name]))
        left = [run for run in runs if run.name not in over]
        failed: dict[str, str] = {}
        pace = Pace(left, time.monotonic(), {run.name: _part(run) for run in left})
        _save(runs, rows, out)
        watch.begin(len(over), len(runs))
        with closing(crew.each([order(run, out) for run in left])) as endings:
            for ended in endings:
                if ended is not None:
                    over[ended.name] = None
                    _settle(by_name[ended.name], ended, rows, failed)
                    _save(runs, rows, out)
                watch.state(len(over), len(runs), pace.left_s(over, time.monotonic()))
                if ended is not None:
                    why = failed.get(ended.name, "")
                    watch.ended(Ended(ended.name, why, ended.seconds), None if why else rows[ended.name])
    return Result(tuple(rows[run.name] for run in runs if run.name in rows), failed)


def order(run: Run, out: Path) -> Order:
    """What a process is told of a run."""
    return Order(run.name, dict(run.config.values), run.audit, run.audit_pairs, str(out / LOGS / f"{run.name}.log"))


def effort(run: Run) -> float:
    """Rounds times the samples of a round, but for a factor that all runs of a data set have in common."""
    config = run.config
    part = min(config.devices.per_round or config.devices.count, config.devices.count) / config.devices.count
    return config.rounds * part * (config.data.limit or 1) * max(1, config.local.epochs)


def _settle(run: Run, ended: Ended, rows: dict[str, table.Row], failed: dict[str, str]) -> None:
    """Put a run that is over among the rows or the failed; one whose audit failed is in both."""
    try:
        summary = folders.summary(run.config)
    except FedsplitError as error:
        failed[run.name] = ended.error or str(error)
        return
    if summary is not None:
        rows[run.name] = table.row(run, summary)
    if ended.error:
        failed[run.name] = ended.error
    elif summary is None:
        failed[run.name] = f"it left no summary in {run.path}; on a cluster --out must be a path that all nodes share."


def _save(runs: Sequence[Run], rows: Mapping[str, table.Row], out: Path) -> None:
    if rows:
        table.write([rows[run.name] for run in runs if run.name in rows], out)


def _part(run: Run) -> float:
    """How much of a run is there; its audit counts as much as its rounds."""
    part = folders.done(run.path, run.config.rounds)
    return part / 2 if run.audit else part


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Make `out`, and keep other sweeps out of it.

    Raises:
        FedsplitError: it cannot be written, or another is at work there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("a")
    except OSError as error:
        raise FedsplitError(f"Cannot write to {out}: {error.strerror}; give another --out.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FedsplitError(
                f"Another fedsplit sweep is at work in {out}; wait for it, or give another --out."
            ) from None
        yield
