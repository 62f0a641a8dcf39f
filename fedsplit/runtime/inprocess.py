"""Clients run in this process, one after another, or in a pool of processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

from fedsplit.client import client_round
from fedsplit.config import Config, resolve
from fedsplit.round import Runner
from fedsplit.runtime import faults
from fedsplit.types import Failure, Job, Scalar, Update
from fedsplit.world import world


def runner(config: Config) -> Loop | Pool:
    """The in-process runner that `engine.workers` asks for."""
    return Pool(config) if config.engine.workers > 1 else Loop(config)


def execute(config: Config, job: Job, *, disposable: bool) -> Update | Failure:
    """A client's round; whatever it raises becomes a `Failure`.

    `disposable` says that this process is the client's own, so an injected `kill` may end it.
    """
    injected = faults.parse(config.engine.faults)
    try:
        faults.before(injected, job, disposable=disposable)
        return faults.after(injected, job, client_round(world(config), job))
    except Exception as error:
        return Failure(job.client, f"{type(error).__name__}: {error}")


@dataclass
class Loop:
    """One client after another, in this process."""

    config: Config

    def run(self, jobs: Sequence[Job]) -> Iterator[Update | Failure]:
        """One result per job, in order."""
        for job in jobs:
            yield execute(self.config, job, disposable=False)

    def close(self) -> None:
        """Nothing to end."""


@dataclass
class Pool:
    """Clients in `engine.workers` processes; one that dies costs its clients the round, not the run."""

    config: Config
    _pool: ProcessPoolExecutor | None = field(default=None, init=False)

    def run(self, jobs: Sequence[Job]) -> Iterator[Update | Failure]:
        """One result per job, as they finish."""
        pool = self._pool or self._start()
        futures: dict[Future[Update | Failure], Job] = {}
        for job in jobs:
            futures[pool.submit(_work, dict(self.config.values), job)] = job
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                self.close()
                yield Failure(futures[future].client, "a worker process died")

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _start(self) -> ProcessPoolExecutor:
        # Spawned, not forked: a fork of a process that has used torch's threads may hang.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(self.config.engine.workers, mp_context=context)
        return self._pool


def _work(values: dict[str, Scalar], job: Job) -> Update | Failure:
    return execute(resolve(values), job, disposable=True)


__all__ = ["Loop", "Pool", "Runner", "execute", "runner"]
