"""Clients run in this process, one after another, or in a pool of processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

from fedsplit.client import client_round
from fedsplit.config import Config, resolve
from fedsplit.round import Runner
from fedsplit.runtime import faults, forks
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
    """Clients in `engine.workers` processes.

    One that dies costs its clients the round, not the run; so does one that is silent for
    `engine.timeout_s` seconds.
    """

    config: Config
    _pool: ProcessPoolExecutor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """What the processes need is imported while this one prepares the run."""
        forks.context(self.config.values)

    def run(self, jobs: Sequence[Job]) -> Iterator[Update | Failure]:
        """One result per job, as they finish."""
        pool = self._pool or self._start()
        values = dict(self.config.values)
        left = {_submit(pool, values, job): job for job in jobs}
        while left:
            done, _ = wait(left, timeout=self.config.engine.timeout_s, return_when=FIRST_COMPLETED)
            if not done:
                self._kill()
                yield from (Failure(job.client, "no reply in time") for job in left.values())
                return
            for future in done:
                job = left.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    self.close()
                    yield Failure(job.client, "a worker process died")

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _start(self) -> ProcessPoolExecutor:
        self._pool = ProcessPoolExecutor(
            self.config.engine.workers,
            mp_context=forks.context(self.config.values),
            initializer=forks.enter,
            initargs=(dict(os.environ),),
        )
        return self._pool

    def _kill(self) -> None:
        for process in list((self._pool._processes or {}).values()) if self._pool else ():
            process.kill()
        self.close()


def _submit(pool: ProcessPoolExecutor, values: dict[str, Scalar], job: Job) -> Future[Update | Failure]:
    try:
        return pool.submit(_work, values, job)
    except BrokenProcessPool as broken:  # a worker died while the jobs were handed out
        failed: Future[Update | Failure] = Future()
        failed.set_exception(broken)
        return failed


def _work(values: dict[str, Scalar], job: Job) -> Update | Failure:
    return execute(resolve(values), job, disposable=True)


__all__ = ["Loop", "Pool", "Runner", "execute", "runner"]
