"""One run in a process of its own: train it, or go on with it, then audit it; what went wrong is a sentence."""

from __future__ import annotations

import shutil
import signal
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fedsplit import audit, experiment
from fedsplit.config import resolve
from fedsplit.progress import Silent
from fedsplit.runtime import forks
from fedsplit.runtime.inprocess import runner
from fedsplit.sweep import folders
from fedsplit.types import FedsplitError, Scalar

LEFTOVERS = {"checkpoint", ".config.toml.new"}


@dataclass(frozen=True)
class Order:
    """What one run is to do: train `values`, then with `audit`, a suite, be attacked; `log` is a file for its words."""

    name: str
    values: Mapping[str, Scalar]
    audit: str = ""
    audit_pairs: tuple[str, ...] = ()
    log: str = ""


@dataclass
class Watch(Silent):
    """Says what is worth a line; a line a round, too, where all goes to a file of its own."""

    name: str = ""
    rounds: bool = False

    def row(self, row: Mapping[str, Any]) -> None:
        """A line a round."""
        if self.rounds:
            print(
                f"  {self.name}: round {row['round']}, test accuracy {row['accuracy']}, {row['wall_s']} s", flush=True
            )

    def note(self, text: str) -> None:
        """A line with the run's name."""
        print(f"  {self.name}: {text}", flush=True)


class Unwatched:
    """Nobody follows an audit."""

    def attack(self, name: str, seed: int, total: int) -> None:
        """Nothing."""

    def step(self, what: str, done: int, total: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


def work(order: Order, reply: Connection) -> None:
    """One run, in its process: sends an error's text, or an empty one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, too, and ends its children
    forks.leash()
    reply.send(attempt(order))


def attempt(order: Order) -> str:
    """Do what is left of `order`; returns an error's text, or an empty one."""
    with _spoken(order.log):
        try:
            path = Path(str(order.values["out"]))
            if not (path / "summary.json").is_file():
                train(order.values, order.name, rounds=bool(order.log))
            if order.audit and not folders.audited(path, order.audit, order.audit_pairs):
                attack(path, order.audit, order.audit_pairs)
        except FedsplitError as error:
            print(f"  {order.name}: {error}", flush=True)
            return str(error)
        except Exception as error:  # whatever ends a run is a line of the table, and the others go on
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"
    return ""


def train(values: Mapping[str, Scalar], name: str, rounds: bool = False) -> None:
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
        experiment.run(config, clients, progress=Watch(name=name, rounds=rounds))
    finally:
        clients.close()
    for spent in ("checkpoint", "clients"):  # most of the disk, for nothing any more
        shutil.rmtree(path / spent, ignore_errors=True)


def attack(path: str | Path, suite: str, pairs: Sequence[str]) -> str:
    """Audit the finished run in `path`; returns what was found in a few words.

    Raises:
        FedsplitError: what stopped it.
    """
    target = audit.of_run(path, suite, pairs)
    found = audit.run(target, Path(path).resolve() / "audit", {}, Unwatched())
    ssim = found["worst_ssim"]
    return "no attack on images" if ssim is None else f"worst SSIM {ssim:.3f} ({found['worst_attack']})"


@contextmanager
def _spoken(log: str) -> Iterator[None]:
    """What is printed goes to the end of file `log`, if there is one."""
    if not log:
        yield
        return
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        yield
