"""`flwr run` from end to end, on a SuperLink of its own."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from probed import ENV, PROBE, ROOT, processes_in

from fedsplit.runtime import processes, superlink
from fedsplit.runtime.superlink import Result, flwr_run
from fedsplit.types import FedsplitError, Scalar


def test_pairs() -> None:
    values = superlink._pairs(["a=1", "b.c=0.5", "d=true", "e=iid", "f='x y'", "g="])
    assert values == {"a": 1, "b.c": 0.5, "d": True, "e": "iid", "f": "x y", "g": ""}
    with pytest.raises(FedsplitError, match="key=value"):
        superlink._pairs(["nothing"])


def test_tail_says_what_ended_the_run() -> None:
    log = ["RuntimeError: a client's", "ERROR : Simulation raised an exception", "Traceback (most recent call last):"]
    log += ["  raise x", "pkg.FedsplitError: quorum", "ERROR : Exit Code: 700", "An unhandled exception occurred"]
    assert superlink._tail(log) == "\n  pkg.FedsplitError: quorum"
    assert superlink._tail(["", "one", "two"], most=1) == "\n  two"


def test_environment_is_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    env = superlink.environment(tmp_path, "mark", {"MORE": "1"})
    assert "RAY_ADDRESS" not in env and env["FLWR_HOME"] == str(tmp_path) and env["MORE"] == "1"
    assert env["FLWR_TELEMETRY_ENABLED"] == "0" and env[processes.MARK] == "mark"


def test_marked_processes_end_with_their_children() -> None:
    script = "import subprocess, time; subprocess.Popen(['sleep', '60'], env={}); time.sleep(60)"
    with pytest.raises(ValueError, match="boom"), processes.no_process_left() as mark:
        env = {**os.environ, processes.MARK: mark}
        parent = psutil.Process(subprocess.Popen([sys.executable, "-c", script], env=env, start_new_session=True).pid)
        while not (children := parent.children()):
            time.sleep(0.01)
        raise ValueError("boom")
    assert not processes._alive(parent) and not processes._alive(children[0])


def test_not_an_app(tmp_path: Path) -> None:
    with pytest.raises(FedsplitError, match="not a Flower app"):
        flwr_run(tmp_path, {}, nodes=2)


def test_a_bundle_is_made_of_little(tmp_path: Path) -> None:
    for name in (".venv/a.py", "app/a.py", "app/weights.bin", "runs/r/config.toml", ".gitignore", "pyproject.toml"):
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).touch()
    (tmp_path / "from" / "link.py").symlink_to("nowhere")
    shutil.copytree(tmp_path / "from", tmp_path / "to", ignore=superlink.not_for_a_bundle)
    found = {path.relative_to(tmp_path / "to").as_posix() for path in (tmp_path / "to").rglob("*") if path.is_file()}
    assert found == {"app/a.py", ".gitignore", "pyproject.toml"}


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(app: Path, values: dict[str, Scalar], **options: Any) -> Result:
        options["echo"](f"{app} {values} {options['nodes']} {options['cpus_per_client']} {options['ray_cpus']}")
        if "fail" in values:
            raise FedsplitError("The Flower run ended as 'finished:failed'.")
        return Result("1", "", 0.0)

    monkeypatch.setattr(superlink, "flwr_run", run)
    assert superlink.main(["--app", "here", "--nodes", "3", "--ray-cpus", "2", "seconds=0.5"]) == 0
    assert capsys.readouterr().out == "here {'seconds': 0.5} 3 1 2\n"
    assert superlink.main(["fail=true"]) == 1
    assert capsys.readouterr().err == "error: The Flower run ended as 'finished:failed'.\n"


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fedsplit.runtime.superlink", "--app", str(PROBE), "--nodes", "2", *arguments]


@pytest.mark.slow
def test_an_unknown_key_is_an_error(workplace: Path) -> None:
    with pytest.raises(FedsplitError, match="Invalid run configuration"):
        flwr_run(PROBE, {"no-such-key": 1}, nodes=2, env=ENV, cwd=workplace)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(workplace: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        _command("seconds=60.0"),
        cwd=workplace,
        env={**os.environ, **ENV},
        stdout=subprocess.PIPE,
        text=True,
        # Who starts the tests in the background of a script has its children ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout
    # SIGTERM while Ray works, SIGINT while the simulation starts.
    sign = "NODES" if number == signal.SIGTERM else "Starting Flower Simulation"
    assert any(sign in line for line in process.stdout)
    if number == signal.SIGTERM:
        _wait_for(lambda: any("ray::" in line for line in processes_in(workplace)), 60)
    process.send_signal(number)
    assert process.wait(timeout=30) == 128 + number


def _wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


@pytest.mark.slow
def test_one_actor_without_a_network(workplace: Path) -> None:
    """The real app, from another folder, in a network namespace that has only loopback; its only actor is killed."""
    cut = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    allowed = subprocess.run([*cut, "true"], capture_output=True).returncode == 0
    command = [*(cut if allowed else ()), sys.executable, "-m", "fedsplit.runtime.superlink"]
    command += ["--app", str(ROOT), "--nodes", "2", "--ray-cpus", "1"]
    config = ["rounds=2", "devices.count=4", "data.partition=iid", "data.limit=64", "data.test-limit=50"]
    config += ["model.name=fedsplit_nano", "model.pretrained=false", "out=run", "engine.faults=kill:1@1"]
    found = subprocess.run([*command, *config], cwd=workplace, capture_output=True, text=True, timeout=180)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr
    with (workplace / "run" / "clients.csv").open() as file:
        failures = {(row["round"], row["client"]): row["failure"] for row in csv.DictReader(file)}
    assert len(failures) == 2 * 4 and failures.pop(("1", "1")) == "its process died (ActorDiedError)"
    assert set(failures.values()) == {""}
    if not allowed:
        pytest.skip("needs the right to cut the network off (unshare -n); with a network all held")
