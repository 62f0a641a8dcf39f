"""Many training runs, each in a process and a folder of its own; what is already there is not run again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fedsplit import experiment
from fedsplit.config import resolve
from fedsplit.front import models
from fedsplit.progress import Silent
from fedsplit.runs import RunFolder
from fedsplit.runtime.inprocess import runner
from fedsplit.types import Failure, FedsplitError, Scalar, Update
from fedsplit.world import LOCAL_SECTIONS, ghost
from papers.figures import of_tables
from papers.scoreboard import Run

# Keys that change no figure of a finished run, beside those of the engine.
ASIDE = ("out", "resume", "name", "data.cache", "eval.every")
LEFTOVERS = {"checkpoint", ".config.toml.new"}
# What runs import: this first, as it mends torchvision.
IMPORTED = ["papers.work", "sklearn.datasets", "matplotlib.figure", "matplotlib.backends.backend_agg", "peft"]

Summary = Mapping[str, Any]
Say = Callable[[str], None]


@dataclass
class Child:
    """A run in its process; `reply` gives an error's text, or an empty one."""

    run: Run
    process: BaseProcess
    reply: Connection
    begun: float

    def ended(self) -> str:
        """Why it failed; empty if it did not."""
        self.process.join()
        try:
            return str(self.reply.recv())
        except EOFError:
            return f"its process ended with code {self.process.exitcode}"


@dataclass
class Watch(Silent):
    """Says what is worth a line, and ends this process when the one that began it is gone."""

    name: str = ""

    def note(self, text: str) -> None:
        """A line with the run's name."""
        print(f"  {self.name}: {text}", flush=True)

    def heard(self, result: Update | Failure) -> None:
        """End an orphan: the same scoreboard begun again would otherwise write to the same folder."""
        parent = parent_process()
        if parent is not None and not parent.is_alive():
            os._exit(1)


def validate(runs: Sequence[Run], say: Say) -> None:
    """Check that the runs can begin: folders, data, shards and cut, before anything is trained.

    Raises:
        FedsplitError: what is wrong with the first that cannot.
    """
    folders: dict[str, Run] = {}
    for run in runs:
        other = folders.setdefault(run.name, run)
        if _values(other.config.values) != _values(run.config.values):
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
            built = ghost(run.config)
            experiment.check(run.config, built)
            if not number:  # weights that cannot be had would fail in every run
                models.create(run.config.model, len(built.data.classes), run.seed)
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
    children: list[Child] = []
    begun, total = time.monotonic(), len(left)
    try:
        while left or children:
            while left and len(children) < jobs:
                children.append(start(left.pop(0)))
            connection.wait([child.process.sentinel for child in children])
            for child in [child for child in children if not child.process.is_alive()]:
                children.remove(child)
                name, error = child.run.name, child.ended()
                summary = None if error else finished(child.run)
                if summary is None:
                    failed[name] = error or "it left no summary"
                else:
                    summaries[name] = summary
                each = (time.monotonic() - begun) / (total - len(left) - len(children))
                minutes = each * (len(left) + len(children)) / 60
                state = f"[{len(summaries) + len(failed):>3} of {len(unique)}]"
                say(f"{state} {_line(child, summary, error)}  about {minutes:.1f} min left")
    finally:
        for child in children:
            child.process.terminate()
            child.process.join()
    return summaries, failed


def start(run: Run) -> Child:
    """Begin a run in a new process.

    On the CPU it is forked from a process that has imported what runs import, and has done nothing else: a
    fork of one that has used torch's threads, or the GPU, may hang.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # the new process reads it when it imports torch
    if run.config.device == "cpu" and sys.platform == "linux":
        context: Any = get_context("forkserver")
        ready()
    else:
        context = get_context("spawn")
    reply, send = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(dict(run.config.values), run.name, send))
    process.start()
    send.close()
    return Child(run, process, reply, time.monotonic())


def ready() -> None:
    """Begin the process that imports once for all runs, if it is not there yet; does not wait for it."""
    forkserver.set_forkserver_preload(IMPORTED)
    kept = dict(os.environ)
    # It is a `python -c`, which would import from the working directory before all else.
    os.environ.update(PYTHONPATH=os.pathsep.join(sys.path), PYTHONSAFEPATH="1")
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(kept)


def work(values: Mapping[str, Scalar], name: str, reply: Connection) -> None:
    """One run, in its process: sends an error's text, or an empty one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, too, and ends its children
    try:
        train(values, name)
        reply.send("")
    except FedsplitError as error:
        reply.send(str(error))
    except Exception as error:  # whatever ends a run is a line of the table, and the others go on
        traceback.print_exc()
        reply.send(f"{type(error).__name__}: {error}")


def train(values: Mapping[str, Scalar], name: str) -> None:
    """A run to its end, from its last checkpoint where it had begun.

    Raises:
        FedsplitError: what stopped it.
    """
    config = resolve(values)
    path = Path(config.out)
    if (path / "config.toml").is_file():
        config = config.replace(resume=str(path))
    elif path.is_dir() and {item.name for item in path.iterdir()} <= LEFTOVERS:
        shutil.rmtree(path)  # it died before it wrote its config
    clients = runner(config)
    try:
        experiment.run(config, clients, progress=Watch(name=name))
    finally:
        clients.close()
    for spent in ("checkpoint", "clients"):  # most of the disk, for nothing any more
        shutil.rmtree(path / spent, ignore_errors=True)


def finished(run: Run) -> Summary | None:
    """The summary of a run that is there, with what its tables add; None if it is still to be run, or to be ended.

    Raises:
        FedsplitError: its folder holds a run of another config.
    """
    path = Path(run.config.out)
    if not (path / "config.toml").is_file():
        return None
    folder, stored = RunFolder.open(path)
    there, wanted = _values(stored.values), _values(run.config.values)
    for key in wanted:
        if there[key] != wanted[key]:
            raise FedsplitError(
                f"{path} holds a run with {key}={there[key]}, not {wanted[key]}; delete it or choose another --out."
            )
    file = path / "summary.json"
    if not file.is_file():
        return None
    summary: Summary = json.loads(file.read_text(encoding="utf-8"))
    return {**summary, **of_tables(folder, stored)}


def _line(child: Child, summary: Summary | None, error: str) -> str:
    seconds = f"{time.monotonic() - child.begun:.0f} s"
    if summary is None:
        return f"{child.run.name} failed after {seconds}: {error}"
    lost = f", {summary['failures']} client rounds failed" if summary["failures"] else ""
    return f"{child.run.name:<40} accuracy {100 * summary['accuracy']:5.1f} %  {seconds:>6}{lost}"


def _values(values: Mapping[str, Scalar]) -> dict[str, Scalar]:
    return {key: value for key, value in values.items() if key not in ASIDE and not key.startswith(LOCAL_SECTIONS)}
