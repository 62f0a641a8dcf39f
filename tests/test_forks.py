"""Processes that others begin: with whose environment, from which imports, and that none outlives who began it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import Pipe
from types import SimpleNamespace

import psutil
import pytest

from fedsplit.config import resolve
from fedsplit.runtime import forks

KILLED = """
import os, signal, sys
from concurrent.futures import ProcessPoolExecutor
from fedsplit.runtime import forks

if __name__ == "__main__":
    context = forks.context({"device": "cpu", "body.edits": ""}, ())
    with ProcessPoolExecutor(2, context, forks.enter, (dict(os.environ),)) as pool:
        list(pool.map(abs, range(20)))
        print(os.getpid(), *pool._processes, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_ends_with_the_one_that_began_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    sentinel, parent = Pipe(duplex=False)
    monkeypatch.setattr(forks, "parent_process", lambda: SimpleNamespace(sentinel=sentinel.fileno()))
    monkeypatch.setattr(os, "_exit", ended.append)
    leash = forks.leash()
    leash.join(0.05)
    assert leash.is_alive() and not ended
    parent.close()
    leash.join(10)
    assert ended == [1]


@pytest.mark.slow
def test_a_killed_run_leaves_no_worker(tmp_path: os.PathLike[str]) -> None:
    script = os.path.join(tmp_path, "killed.py")
    with open(script, "w", encoding="utf-8") as file:
        file.write(KILLED)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    left = [int(word) for word in done.stdout.split()]
    assert done.returncode == -9 and len(left) > 1, done.stderr
    deadline = time.monotonic() + 20
    while alive := [one for one in left if psutil.pid_exists(one)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


@pytest.mark.slow
def test_workers_of_a_pool_have_the_environment_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the process they are forked from, which began earlier."""
    values = resolve({}).values
    forks.ready([values])
    monkeypatch.setenv("FEDSPLIT_TEST_OF_FORKS", "later")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with ProcessPoolExecutor(1, forks.context(values), forks.enter, (dict(os.environ),)) as pool:
        assert pool.submit(os.getenv, "FEDSPLIT_TEST_OF_FORKS").result() == "later"
        assert pool.submit(os.getenv, "PYTHONSAFEPATH").result() is None


def test_off_the_cpu_processes_are_spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "ready", lambda *_: pytest.fail("forked"))
    assert forks.context({"device": "cuda", "body.edits": ""}).get_start_method() == "spawn"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert forks.context({"device": "cpu", "body.edits": ""}).get_start_method() == "spawn"
