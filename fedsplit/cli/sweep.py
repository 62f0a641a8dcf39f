"""`fedsplit sweep`: run a study, or go on with it, and print its table."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.types import FedsplitError

if TYPE_CHECKING:
    from rich.console import Console

    from fedsplit.sweep.conduct import Result
    from fedsplit.sweep.pool import Crew, Ended
    from fedsplit.sweep.study import Run, Study

FAILED, STOPPED = 1, 130
WIDTH = 120  # of what is no terminal
SILENCE_S = 60.0


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Put the command's parser beside the others."""
    about = "run a grid over any keys with seeds, or go on with it, and write one table"
    parser = commands.add_parser("sweep", help=about, description=about)
    parser.set_defaults(handler=run)
    parser.add_argument("study", metavar="STUDY.toml", help="study file: config, [set], [grid], [[arms]], seeds, audit")
    parser.add_argument("--out", metavar="DIR", help="folder of the runs and the table; sweeps/NAME if left out")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time; a core each, or the CPUs of the cluster")
    where = "run on a Ray cluster: host:port, ray://host:port, auto for one on this machine, local for a new one"
    parser.add_argument("--ray", metavar="ADDRESS", help=where)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one key of every run")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the points, and run nothing")
    parser.add_argument("--json", action="store_true", help="one JSON document")


def run(options: argparse.Namespace) -> int:
    """Check, run, print; the exit code is 1 when a run failed, 130 when it was stopped.

    Raises:
        FedsplitError: whatever is wrong, before a run begins.
    """
    from rich.console import Console

    from fedsplit.sweep import conduct, pool, study

    if options.jobs is not None and options.jobs < 1:
        raise FedsplitError(f"--jobs must be at least 1, got {options.jobs}.")
    asked = study.read(options.study).with_pairs(options.set)
    out = Path(options.out or Path("sweeps") / asked.name).expanduser().resolve()
    runs = asked.runs(out)
    begun = time.monotonic()
    watch = Follow(Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH))
    if not (options.dry_run or options.ray) and all(each.config.device == "cpu" for each in runs):
        pool.ready([each.config.values for each in runs])  # imports beside the checks
    try:
        with watch:
            there = conduct.check(runs, watch)
            if options.dry_run:
                watch.stop()
                return _points(asked, runs, there, out, options.json)
            with crew(options.ray, options.jobs, runs) as workers:
                found = conduct.sweep(asked, runs, there, out, workers, watch)
    except KeyboardInterrupt:
        print(
            f"fedsplit: stopped, {watch.done} of {len(runs)} runs are there; the same command goes on", file=sys.stderr
        )
        return STOPPED
    _report(asked, runs, found, out, time.monotonic() - begun, options.json)
    return FAILED if found.failed else 0


@contextmanager
def crew(ray: str | None, jobs: int | None, runs: Sequence[Run]) -> Iterator[Crew]:
    """Who carries out the runs: a cluster, or this machine's cores; one at a time where they take the GPU.

    Raises:
        FedsplitError: no cluster answers.
    """
    if ray:
        from fedsplit.sweep.cluster import connected

        with connected(ray, jobs) as cluster:
            yield cluster
        return
    from fedsplit.sweep.pool import Pool

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = any(each.config.device != "cpu" for each in runs)
    yield Pool(jobs or (1 if shared else cores))


class Follow:
    """A bar with the time left in a terminal; elsewhere a line a run."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = console
        self.done = self._total = 0
        self._left = ""
        self._spoke = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("runs"))
        self._bar = Progress(
            *columns, TimeElapsedColumn(), TextColumn("{task.fields[left]}"), console=console, transient=True
        )
        self._task = self._bar.add_task("check", total=None, left="")

    def __enter__(self) -> Follow:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar away."""
        if self.console.is_terminal:
            self._bar.stop()

    def checking(self, done: int, total: int) -> None:
        """So many of the configs are checked."""
        self._bar.update(self._task, completed=done, total=total)

    def begin(self, there: int, total: int) -> None:
        """`there` of all runs are finished already."""
        self.done, self._total = there, total
        self._bar.update(self._task, description="sweep", completed=there, total=total)
        self._say(f"{there} of {total} runs are already there" if there else f"{total} runs")

    def ended(self, ended: Ended, row: Mapping[str, Any] | None) -> None:
        """A line a run."""
        number = f"[{self.done:>{len(str(self._total))}} of {self._total}]"
        found = f"FAILED: {ended.error}" if row is None else f"accuracy {100 * row['accuracy']:.1f} %"
        self._say(f"{number} {ended.name}  {found}  {ended.seconds:.0f} s  {self._left}".rstrip())

    def state(self, done: int, total: int, left_s: float | None) -> None:
        """Move the bar; where there is none, a line when there was none for a while."""
        self._left = "" if left_s is None or done == total else f"about {duration(left_s)} left"
        self._bar.update(self._task, completed=done, left=self._left)
        if not self.console.is_terminal and done == self.done and time.monotonic() - self._spoke > SILENCE_S:
            self._say(f"{done} of {total} runs  {self._left}".rstrip())
        self.done = done

    def _say(self, text: str) -> None:
        self._spoke = time.monotonic()
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _points(asked: Study, runs: Sequence[Run], there: Mapping[str, Any], out: Path, as_json: bool) -> int:
    """Print what would run."""
    if as_json:
        listed = [
            {**each.point, "seed": each.seed, "folder": str(each.path), "finished": each.name in there} for each in runs
        ]
        print(json.dumps({"name": asked.name, "out": str(out), "runs": listed}, indent=2))
        return 0
    keys = list(runs[0].point)
    counts: dict[tuple[str, ...], int] = {}
    for each in runs:
        point = tuple(str(value) for value in each.point.values())
        counts[point] = counts.get(point, 0) + (each.name in there)
    cells = [[*point, str(len(asked.seeds)), str(count)] for point, count in counts.items()]
    _print(f"{asked.name}: {len(counts)} points, {len(runs)} runs, in {out}", [*keys, "seeds", "finished"], cells)
    return 0


def _report(asked: Study, runs: Sequence[Run], found: Result, out: Path, seconds: float, as_json: bool) -> None:
    """Print means, failures, and last the table's path."""
    from fedsplit.sweep import table

    file = out / f"{table.NAME}.csv" if found.rows else None
    points = table.means(found.rows, runs)
    if as_json:
        said = {
            "name": asked.name,
            "table": str(file) if file else None,
            "runs": len(runs),
            "finished": len(found.rows),
        }
        print(
            json.dumps({**said, "failed": dict(found.failed), "seconds": round(seconds, 1), "points": points}, indent=2)
        )
        return
    _print(f"{asked.name}: means over seeds ± standard deviation", *table.shown(points, list(runs[0].point)))
    for name, why in found.failed.items():
        print(f"Failed: {name}: {why}")
    if found.failed:
        print(
            f"{len(found.failed)} of {len(runs)} runs failed; the same command tries them again. Logs: {out / 'logs'}"
        )
    if file:
        print(file)


def _print(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table()
    for name in columns:
        shown.add_column(name, justify="right")
    for line in lines:
        shown.add_row(*line)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(title, highlight=False, soft_wrap=True, markup=False)
    console.print(shown)
