"""Runs in processes of this machine, so many at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

from fedsplit.runtime import forks
from fedsplit.sweep.work import Order, work
from fedsplit.types import Scalar

# What runs import.
IMPORTED = ("fedsplit.sweep.work", "matplotlib.figure", "matplotlib.backends.backend_agg")
HEARTBEAT_S = 1.0

T = TypeVar("T")


@dataclass(frozen=True)
class Ended:
    """A run that is over: why it failed, empty if it did not, and how long this attempt took."""

    name: str
    error: str
    seconds: float


Endings = Generator[Ended | None, None, None]


class Crew(Protocol):
    """Who carries out orders."""

    def each(self, orders: Sequence[Order]) -> Endings:
        """Every order as it ends, and None now and then; when it is closed, what is under way is ended."""


@dataclass
class Child:
    """A run in its process; `reply` gives an error's text, or an empty one."""

    run: Any
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


@dataclass(frozen=True)
class Pool:
    """`jobs` processes at a time."""

    jobs: int

    def each(self, orders: Sequence[Order]) -> Endings:
        """Every order as it ends, and None every second."""
        with closing(spread(orders, self.jobs, lambda order: start(order, order), HEARTBEAT_S)) as children:
            for child in children:
                if child is None:
                    yield None
                else:
                    yield Ended(child.run.name, child.ended(), time.monotonic() - child.begun)


def spread(
    runs: Sequence[T], jobs: int, begin: Callable[[T], Child], every_s: float | None = None
) -> Generator[Child | None, None, None]:
    """Begin `runs` in turn, `jobs` at a time; yields those whose process has ended, and None after `every_s` without.

    When it is closed, processes that are under way are ended.
    """
    left, children = list(runs), list[Child]()
    try:
        while left or children:
            while left and len(children) < jobs:
                children.append(begin(left.pop(0)))
            if not connection.wait([child.process.sentinel for child in children], every_s):
                yield None
            for child in [child for child in children if not child.process.is_alive()]:
                children.remove(child)
                yield child
    finally:
        for child in children:
            child.process.terminate()
        for child in children:
            child.process.join()


def start(run: Any, order: Order) -> Child:
    """Begin an order in a new process; `run` is whatever the caller knows it by."""
    os.environ["OMP_NUM_THREADS"] = "1"  # the new process reads it when it imports torch
    context = forks.context(order.values, IMPORTED)
    reply, send = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(order, send))
    process.start()
    send.close()
    return Child(run, process, reply, time.monotonic())


def ready(runs: Iterable[Mapping[str, Scalar]]) -> None:
    """Begin the process that imports once for all runs; see `forks.ready`."""
    forks.ready(runs, IMPORTED, OMP_NUM_THREADS="1")
