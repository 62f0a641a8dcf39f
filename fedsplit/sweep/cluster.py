"""Runs as tasks of a Ray cluster: each on one CPU, its folder on a path that all nodes share."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from fedsplit.sweep.pool import HEARTBEAT_S, Ended, Endings
from fedsplit.sweep.work import Order, attempt
from fedsplit.types import FedsplitError

AUTO, LOCAL = "auto", "local"
ANSWER_S = 5.0


@dataclass(frozen=True)
class Cluster:
    """Tasks of the cluster that this process is connected to, `jobs` at a time."""

    jobs: int

    def each(self, orders: Sequence[Order]) -> Endings:
        """Every order as it ends, and None every second."""
        import ray

        # A run whose node is lost has failed, and goes on when the command is given again: Ray does not know whether
        # the first attempt still writes to its folder.
        task: Any = ray.remote(num_cpus=1, max_retries=0)(attempt)
        left, under_way = list(orders), dict[Any, tuple[Order, float]]()
        try:
            while left or under_way:
                while left and len(under_way) < self.jobs:
                    order = left.pop(0)
                    gpus = 1 if order.values["device"] == "cuda" else 0
                    under_way[task.options(num_gpus=gpus, name=order.name).remote(order)] = order, time.monotonic()
                finished, _ = ray.wait(list(under_way), num_returns=1, timeout=HEARTBEAT_S)
                for reference in finished:
                    order, begun = under_way.pop(reference)
                    yield Ended(order.name, _outcome(ray, reference), time.monotonic() - begun)
                if not finished:
                    yield None
        finally:
            for reference in under_way:
                with suppress(Exception):  # it may have ended by itself
                    ray.cancel(reference, force=True)


@contextmanager
def connected(address: str, jobs: int | None) -> Iterator[Cluster]:
    """The Ray cluster at `address`: host:port, ray://host:port, 'auto' for one on this machine, or 'local' for a new
    one of `jobs` CPUs that ends with the sweep.

    Raises:
        FedsplitError: Ray is not installed, or no cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise FedsplitError("--ray needs the package 'ray': pip install 'fedsplit[simulation]'.") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _reach(os.environ.get("RAY_ADDRESS", address) if address == AUTO else address)
    new: dict[str, Any] = {"num_cpus": jobs or os.cpu_count(), "include_dashboard": False} if address == LOCAL else {}
    try:
        with warnings.catch_warnings():  # of a change that Ray plans
            warnings.simplefilter("ignore", FutureWarning)
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **new)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, OSError) as error:
        raise _silent(address, str(error)) from None
    try:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        yield Cluster(jobs or max(1, int(resources.get("CPU", 1))))
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Whether somebody listens at host:port; Ray itself would try for minutes."""
    found = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if found is None:
        if address not in (AUTO, LOCAL):
            raise FedsplitError(f"--ray {address} is no address; write host:port, ray://host:port, auto or local.")
        return
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), ANSWER_S).close()
    except OSError as error:
        raise _silent(address, str(error)) from None


def _silent(address: str, why: str) -> FedsplitError:
    reason = " ".join(why.split("\n")[0].split()).rstrip(".")
    return FedsplitError(
        f"--ray {address}: no Ray cluster answers ({reason}); start one with `ray start --head`, or leave --ray out."
    )


def _outcome(ray: Any, reference: Any) -> str:
    """Why a task failed; empty if it did not."""
    try:
        return str(ray.get(reference))
    except ray.exceptions.RayError as error:
        return f"its Ray task failed: {str(error).strip().splitlines()[-1]}"
