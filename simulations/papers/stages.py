"""What stands before and after a training run of a scoreboard: a hardened front; an audit, and a ranking."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fedsplit import harden
from fedsplit.config import resolve
from fedsplit.runtime import forks
from fedsplit.sweep import work
from fedsplit.sweep.folders import worst as found
from fedsplit.types import FedsplitError, Scalar
from papers import rank
from papers.scoreboard import Run

Say = Callable[[str], None]
SUITE = "quick"


def prepare(runs: Sequence[Run], jobs: int, say: Say) -> dict[str, str]:
    """Harden the fronts that the runs begin with, `jobs` at a time, each once; what is there stays.

    Returns:
        Why it failed, by the names of the runs that then cannot begin.
    """
    wanted = {run.hardening.out: run.hardening for run in runs if run.hardening is not None}
    left = {out: config for out, config in wanted.items() if not (Path(out) / "card.md").is_file()}
    tasks = {out: (_harden, dict(config.values)) for out, config in left.items()}
    failed = _each(tasks, jobs, "hardened", say)
    return {run.name: failed[run.hardening.out] for run in runs if run.hardening and run.hardening.out in failed}


def attack(runs: Sequence[Run], jobs: int, say: Say) -> dict[str, str]:
    """Audit the finished runs, `jobs` at a time; what is there stays.

    Returns:
        Why it failed, by the runs' names.
    """
    tasks = {
        run.name: (work.attack, run.config.out, SUITE, run.audit)
        for run in runs
        if run.audit and (Path(run.config.out) / "summary.json").is_file() and not found(Path(run.config.out))
    }
    return _each(tasks, jobs, "audited", say)


def check_splits(runs: Sequence[Run]) -> None:
    """Check the splits that runs are to be ranked by, before anything is trained.

    Raises:
        FedsplitError: one cannot be read, or is of classes that a run trains on.
    """
    for folder, classes in {(run.retrieval, run.config.data.classes) for run in runs if run.retrieval}:
        rank.check(Path(folder), classes)


def retrieve(runs: Sequence[Run], jobs: int, say: Say) -> dict[str, str]:
    """Rank the queries of the finished runs' data, `jobs` at a time; what is there stays.

    Returns:
        Why it failed, by the runs' names.
    """
    tasks = {
        run.name: (rank.keep, run.config.out, Path(run.retrieval))
        for run in runs
        if run.retrieval and (Path(run.config.out) / "summary.json").is_file() and not rank.kept(Path(run.config.out))
    }
    return _each(tasks, jobs, "ranked", say)


def after(run: Run) -> dict[str, Any]:
    """What audit and ranking found of a run."""
    path = Path(run.config.out)
    return {**found(path), **rank.kept(path)}


def _each(tasks: Mapping[str, tuple[Any, ...]], jobs: int, word: str, say: Say) -> dict[str, str]:
    if not tasks:
        return {}
    os.environ["OMP_NUM_THREADS"] = "1"  # the new processes read it when they import torch
    failed: dict[str, str] = {}
    begun = time.monotonic()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=forks.leash) as pool:
        futures: dict[Future[str], str] = {pool.submit(*task): name for name, task in tasks.items()}
        for number, future in enumerate(as_completed(futures), 1):
            name = futures[future]
            try:
                what = future.result()
            except Exception as error:  # one that fails is a line of the table, and the others go on
                what = failed[name] = str(error) if isinstance(error, FedsplitError) else repr(error)
            left = (time.monotonic() - begun) / number * (len(tasks) - number) / 60
            say(f"[{number:>3} of {len(tasks)} {word}] {Path(name).name:<40} {what}  about {left:.1f} min left")
    return failed


def _harden(values: Mapping[str, Scalar]) -> str:
    config = resolve(values)
    folder = harden.run(config, quiet=True)
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    return f"accuracy {100 * card['after']['accuracy']:.1f} %" if "after" in card else "done"


__all__ = ["after", "attack", "check_splits", "prepare", "retrieve"]
