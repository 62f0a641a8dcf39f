"""What notebooks call: a run, an audit, a study. What is on disk is taken as it is, what was interrupted goes on.

    from fedsplit import lab
    run = lab.run("runs/first", "rounds=3", config="configs/demo.toml")
    run = lab.audit(run, suite="quick")
    runs = lab.study("configs/studies/privacy.toml", "runs/privacy", "rounds=3")

They print a line now and then, with the time that is left, and return what `fedsplit.report` reads and draws.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fedsplit import audit as attacks
from fedsplit import experiment, report
from fedsplit.cli.audit import Follow as FollowAudit
from fedsplit.cli.sweep import Follow as FollowSweep
from fedsplit.cli.sweep import crew, duration
from fedsplit.config import load
from fedsplit.progress import Silent
from fedsplit.report.page import comparison
from fedsplit.runs import RunFolder
from fedsplit.runtime.inprocess import runner
from fedsplit.sweep import conduct, folders
from fedsplit.sweep import study as studies
from fedsplit.types import FedsplitError
from fedsplit.world import DEFAULT_DEVICES, World

WIDTH = 120


def run(out: str | Path, *pairs: str, config: str | Path | Sequence[str | Path] = ()) -> report.Run:
    """The run in folder `out` of the TOML files `config` with `key=value` pairs: taken, gone on with, or begun.

    Raises:
        FedsplitError: whatever is wrong with it, or `out` holds a run of another config.
    """
    files = [config] if isinstance(config, str | Path) else list(config)
    wanted = load(files, [*pairs, f"out={Path(out).expanduser().resolve()}"])
    wanted = wanted.replace(devices__count=wanted.devices.count or DEFAULT_DEVICES)
    if folders.summary(wanted) is None:
        begun = (Path(wanted.out) / "config.toml").is_file()
        asked = wanted.replace(resume=wanted.out) if begun else wanted
        clients = runner(asked)
        try:
            experiment.run(asked, clients, progress=Lines(wanted.rounds))
        finally:
            clients.close()
    return report.load(wanted.out)


def audit(run: report.Run, *pairs: str, suite: str = "quick") -> report.Run:
    """The run with its audit by that suite, with pairs of section `audit`: taken where it is there already.

    Raises:
        FedsplitError: as `fedsplit audit`.
    """
    if not folders.audited(run.path, suite, pairs):
        target = attacks.of_run(run.path, suite, pairs)
        with FollowAudit(_console()) as watch:
            attacks.run(target, run.path / "audit", {}, watch)
    return report.load(run.path)


def study(file: str | Path, out: str | Path, *pairs: str, jobs: int = 0) -> list[report.Run]:
    """The runs of a study file (`fedsplit sweep`) with pairs that hold for all of them, `jobs` at a time (as there).

    Raises:
        FedsplitError: whatever is wrong with a run, before any begins; or runs that failed, after the others ended.
    """
    asked = studies.read(file).with_pairs(pairs)
    folder = Path(out).expanduser().resolve()
    runs = asked.runs(folder)
    with FollowSweep(_console()) as watch:
        there = conduct.check(runs, watch)
        with crew(None, jobs or None, runs) as workers:
            found = conduct.sweep(asked, runs, there, folder, workers, watch)
    for name, why in found.failed.items():
        raise FedsplitError(f"{len(found.failed)} of {len(runs)} runs failed; {name}: {why}")
    return [report.load(each.path) for each in runs]


def table(runs: Sequence[report.Run]) -> Any:
    """A `pandas.DataFrame`, a row a group of runs that differ but in their seed: mean ± standard deviation, and units.

    Raises:
        FedsplitError: pandas is missing.
    """
    try:
        import pandas
    except ModuleNotFoundError:
        raise FedsplitError("lab.table needs pandas: pip install 'fedsplit[notebooks]'.") from None
    found = comparison(report.groups(runs))
    return pandas.DataFrame(found["rows"], columns=found["headings"]).set_index("group")


def one(runs: Sequence[report.Run], wanted: Mapping[str, Any]) -> report.Run:
    """The first of `runs` whose config has these values.

    Raises:
        FedsplitError: there is none.
    """
    for each in runs:
        if all(each.config.get(key) == value for key, value in wanted.items()):
            return each
    said = ", ".join(f"{key}={value!r}" for key, value in wanted.items())
    raise FedsplitError(f"None of the {len(runs)} runs has {said}.")


@dataclass
class Lines(Silent):
    """A line a round, with the time that is left."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self.rounds = rounds
        self._begun, self._done = time.monotonic(), 0

    def begin(self, world: World, folder: RunFolder, done: int) -> None:
        """The clock starts."""
        self._begun, self._done = time.monotonic(), done
        if done:
            print(f"goes on after round {done}", flush=True)

    def row(self, row: Mapping[str, Any]) -> None:
        """The round's accuracy, and what is left."""
        number = int(row["round"])
        each = (time.monotonic() - self._begun) / (number - self._done)
        tested = f"accuracy {100 * row['accuracy']:5.1f} %" if row["accuracy"] != "" else "not tested"
        left = f"   about {duration(each * (self.rounds - number))} left" if number < self.rounds else ""
        print(f"round {number:>3} of {self.rounds}   {tested}{left}", flush=True)

    def note(self, text: str) -> None:
        """As it is."""
        print(text, flush=True)


def _console() -> Console:
    """Plain lines in the cell's output, where a terminal would have a bar."""
    return Console(file=sys.stdout, width=WIDTH, force_terminal=False, force_jupyter=False)
