"""What the commands that run a scoreboard do alike: options, the folder of the runs, and carrying the runs out."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsplit.front.models import SHAPES
from fedsplit.types import FedsplitError, split_names
from papers import kept
from papers.scoreboard import Request, Run
from papers.stages import after, attack, check_splits, prepare, retrieve
from papers.work import Summary, carry_out, finished, validate

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """The summaries of the runs that ended well and why others failed, by name; `there` were in --out, `known` kept."""

    summaries: Mapping[str, Summary]
    failed: Mapping[str, str]
    there: int
    known: Mapping[str, Summary]


def add_options(made: argparse.ArgumentParser) -> None:
    """Add the options of every scoreboard to a command line."""
    made.add_argument("--quick", action="store_true", help="one seed, few images and arms: only shows that it works")
    made.add_argument("--data", metavar="FOLDER", help="folder with train.parquet and test.parquet, e.g. CIFAR-10")
    made.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N-1 (3; with --quick 1)")
    made.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time, a process each (2)")
    made.add_argument("--out", metavar="DIR", help="keep the runs here, and go on with those that are here")
    made.add_argument("--known", action="store_true", help=f"take finished runs from {kept.FOLDER} instead of running")
    made.add_argument("--record", action="store_true", help=f"keep the finished runs in {kept.FOLDER}")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key of every run")


def request(
    options: argparse.Namespace, out: Path, model: str = "fedsplit_micro", only: str = "main", arms: str = ""
) -> Request:
    """The command line, checked.

    Raises:
        FedsplitError: a number below 1, a folder without images, or --record with --quick.
    """
    if options.quick and options.record:
        raise FedsplitError("--quick only shows that it works and is never recorded; leave out --quick or --record.")
    seeds = (1 if options.quick else 3) if options.seeds is None else options.seeds
    for name, number in (("--seeds", seeds), ("--jobs", options.jobs)):
        if number < 1:
            raise FedsplitError(f"{name} must be at least 1, got {number}.")
    data = str(Path(options.data).expanduser().resolve()) if options.data else ""
    for file in ("train.parquet", "test.parquet") if data else ():
        if not (Path(data) / file).is_file():
            raise FedsplitError(f"--data {options.data}: there is no {file}; it needs train.parquet and test.parquet.")
    device = "cpu" if model in SHAPES else "auto"
    pairs, names = tuple(options.set), split_names(arms)
    return Request(out, seeds, options.quick, only, data, model, device, pairs, names, options.known)


@contextlib.contextmanager
def folder(out: str | None) -> Iterator[Path]:
    """The folder of the runs: DIR, made when missing, or one that is gone afterwards.

    Raises:
        FedsplitError: it cannot be made.
    """
    if out is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    path = Path(out).expanduser().resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise FedsplitError(f"Cannot write --out {path}: {error.strerror}; give another folder.") from None
    yield path


def conduct(wanted: Mapping[str, Sequence[Run]], asked: Request, jobs: int, say: Say, keep: bool = False) -> Outcome:
    """Harden, run and audit what the scoreboards `wanted` ask and nobody has yet; with `keep`, keep what they have.

    Raises:
        FedsplitError: a run that cannot begin, or kept runs that cannot be read.
    """
    there = sum(finished(run) is not None for runs in wanted.values() for run in runs)
    held: dict[str, Summary] = {}
    for name, runs in wanted.items() if asked.known else ():
        held |= {run: its for run, its in kept.known(name, [run for run in runs if not finished(run)]).items()}
    if held:
        say(f"{len(held)} runs are known from {kept.FOLDER}")
    summaries, failed = run_all([run for runs in wanted.values() for run in runs if run.name not in held], jobs, say)
    summaries |= held
    for name, runs in wanted.items() if keep else ():
        number = kept.write(name, runs, summaries)
        say(f"{number} runs are kept in {kept.FOLDER / name}.jsonl")
    return Outcome(summaries, failed, there, held)


def run_all(everything: Sequence[Run], jobs: int, say: Say) -> tuple[dict[str, Summary], dict[str, str]]:
    """Harden, run, audit and rank, as the runs ask; the summaries, and why the others failed, by the runs' names.

    Raises:
        FedsplitError: a run that cannot begin.
    """
    check_splits(everything)
    failed = prepare(everything, jobs, say)
    able = [run for run in everything if run.name not in failed]
    validate(able, say)
    summaries, more = carry_out(able, jobs, say)
    failed |= more | attack(able, jobs, say)
    failed |= retrieve([run for run in able if run.name not in failed], jobs, say)
    ended = {run.name: after(run) for run in able if run.name in summaries}
    return {n: {**s, **ended[n]} for n, s in summaries.items() if n not in failed}, failed


def took(minutes: float, jobs: int, asked: Request, outcome: Outcome) -> str:
    """How long a command took, and what of its runs it found done."""
    total = len(outcome.summaries) + len(outcome.failed)
    old = f"; {outcome.there} of {total} runs were already there" if outcome.there else ""
    if outcome.known:
        commits = ", ".join(dict.fromkeys(its["commit"][:7] for its in outcome.known.values() if its.get("commit")))
        old += f"; {len(outcome.known)} of {total} are known from {kept.FOLDER}" + (f" ({commits})" if commits else "")
    changed = f"; {' '.join(asked.pairs)}" if asked.pairs else ""
    return f"This command took {minutes:.1f} minutes with {jobs} jobs on {os.cpu_count() or 1} cores{old}{changed}."
