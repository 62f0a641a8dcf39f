"""Where new processes begin: on Linux, as forks of one that has imported what they need, and done nothing else."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing import connection, forkserver, get_context, parent_process
from typing import Any

from fedsplit.types import Scalar, split_names

# What every client's round imports; it comes first, as it mends torchvision.
CLIENTS = ("fedsplit.runtime.inprocess",)
# What rounds with adapters import besides; it takes seconds.
ADAPTERS = ("peft",)


def context(values: Mapping[str, Scalar], modules: Sequence[str] = CLIENTS) -> Any:
    """The multiprocessing context for processes that work on the config `values`.

    Off the CPU, and off Linux, they are spawned: a fork of a process that has used the GPU, or torch's threads, may
    hang.
    """
    if values["device"] != "cpu" or sys.platform != "linux":
        return get_context("spawn")
    ready([values], modules)
    return get_context("forkserver")


def ready(runs: Iterable[Mapping[str, Scalar]], modules: Sequence[str] = CLIENTS, **environment: str) -> None:
    """Begin the process that imports once for all others, if it is not there yet; does not wait for it.

    `runs` are the values of those to come: whether they have adapters decides what it imports. What is forked from it
    has this process's environment of now with `environment` in it, and no later change.
    """
    adapters = any("lora" in split_names(str(values["body.edits"])) for values in runs)
    forkserver.set_forkserver_preload([*modules, *(ADAPTERS if adapters else ())])
    kept = dict(os.environ)
    # It is a `python -c`, which would import from the working directory before all else.
    os.environ.update(environment, PYTHONPATH=os.pathsep.join(sys.path), PYTHONSAFEPATH="1")
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(kept)


def enter(environment: Mapping[str, str]) -> None:
    """First of all in a worker of a pool: it has the environment of the process that began it, and ends with it."""
    os.environ.clear()
    os.environ.update(environment)
    leash()


def leash() -> threading.Thread:
    """End this process as soon as the one that began it is gone: nothing else would, and it may write to a folder in
    which the same command goes on.
    """
    thread = threading.Thread(target=_outlive_nobody, daemon=True)
    thread.start()
    return thread


def _outlive_nobody() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
