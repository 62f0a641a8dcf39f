"""`flwr run`, safely: on a SuperLink of its own, with the truth about how it ended.

Plain `flwr run` leaves a SuperLink behind that freezes its environment for every later run, shares
it with everybody on the same port, and exits 0 when the run failed. `flwr_run` starts a private
one, asks it how the run ended, and leaves nothing behind, however it is left.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fedsplit.config import read_toml, to_toml
from fedsplit.runtime.processes import MARK, no_process_left
from fedsplit.types import FedsplitError, Scalar

START_S = 60.0
PATHS = ("out", "resume", "model.checkpoint", "data.cache", "data.source")
BUNDLED = (".py", ".toml", ".md", ".yaml", ".yml", ".json", ".jsonl", "LICENSE", ".gitignore")
PRIVATE = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
    "NO_COLOR": "1",
}


@dataclass(frozen=True)
class Result:
    """A completed run: Flower's id, its whole log, and the wall time in seconds with start and stop."""

    run_id: str
    log: str
    wall_s: float


def flwr_run(
    app_dir: Path,
    run_config: Mapping[str, Scalar] | Path,
    *,
    nodes: int,
    cpus_per_client: int = 1,
    ray_cpus: int = 0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_s: float = 3600.0,
    echo: Callable[[str], None] | None = None,
) -> Result:
    """Run a Flower app to its end; `echo` gets every line of the log as it comes.

    Ray takes `ray_cpus` CPUs (0: the machine's) and starts one client process per
    `cpus_per_client` of them. `env` is added to the environment of all processes, and is the only
    way to name an existing Ray cluster (RAY_ADDRESS). `cwd` is their working directory.

    Raises:
        FedsplitError: the run did not start, failed, or took more than `timeout_s` seconds.
    """
    began = time.monotonic()
    if not (app_dir / "pyproject.toml").is_file():
        raise FedsplitError(f"{app_dir} is not a Flower app: it has no pyproject.toml.")
    with private_home() as home, no_process_left() as mark:
        variables = environment(home, mark, env or {})
        values = dict(read_toml(run_config) if isinstance(run_config, Path) else run_config)
        make_absolute(values, cwd or Path.cwd())
        (home / "run.toml").write_text(to_toml(values), encoding="utf-8")
        shutil.copytree(app_dir, home / "app", ignore=not_for_a_bundle)
        _start_superlink(home, variables, cwd)
        federation = f"num-supernodes={nodes} client-resources-num-cpus={cpus_per_client}"
        if ray_cpus:
            federation += f" init-args-num-cpus={ray_cpus}"
        command = [tool("flwr"), "run", str(home / "app"), "private", "--stream"]
        command += ["--run-config", str(home / "run.toml"), "--federation-config", federation]
        log = _stream(command, variables, cwd, began + timeout_s, echo or (lambda line: None))
        run_id = _completed_run(variables, cwd, log)
    return Result(run_id, "\n".join(log), time.monotonic() - began)


def make_absolute(values: dict[str, Scalar], cwd: Path) -> None:
    """Relative paths mean the caller's folder; the run's processes work elsewhere."""
    for key in PATHS:
        path = cwd / Path(str(values.get(key) or "")).expanduser()
        if values.get(key) and (key != "data.source" or path.exists()):
            values[key] = str(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 only when the run completed."""
    parser = argparse.ArgumentParser(prog="python -m fedsplit.runtime.superlink", description=main.__doc__)
    parser.add_argument("--nodes", type=int, default=10, help="SuperNodes to simulate")
    parser.add_argument("--cpus-per-client", type=int, default=1, help="CPUs of one client process")
    parser.add_argument("--ray-cpus", type=int, default=0, help="CPUs that Ray takes; 0 is the machine's")
    parser.add_argument("--app", type=Path, default=Path("."), help="folder with the app's pyproject.toml")
    parser.add_argument("--config", type=Path, help="TOML file with run config")
    parser.add_argument("pairs", nargs="*", metavar="key=value", help="run config on top of the file")
    given = parser.parse_args(arguments)
    try:
        values = {**(read_toml(given.config) if given.config else {}), **_pairs(given.pairs)}
        flwr_run(
            given.app,
            values,
            nodes=given.nodes,
            cpus_per_client=given.cpus_per_client,
            ray_cpus=given.ray_cpus,
            echo=lambda line: print(line, flush=True),
        )
    except FedsplitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _pairs(texts: Sequence[str]) -> dict[str, Scalar]:
    """`key=value` pairs; a value is read as TOML where it can be, else it is text."""
    values: dict[str, Scalar] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise FedsplitError(f"'{text}' is not key=value.")
        try:
            values[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            values[name] = value
    return values


def tool(name: str) -> str:
    """A command of this Python's environment, whatever PATH says."""
    return str(Path(sys.executable).parent / name)


def environment(home: Path, mark: str, extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of Flower's processes: private to `home`, marked for `no_process_left`."""
    outer = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{outer.get('PATH', os.defpath)}"
    # An own RAY_TMPDIR also hides the user's cluster, which ray.init would otherwise join.
    private = {**PRIVATE, "PATH": path, "FLWR_HOME": str(home), "RAY_TMPDIR": str(home), MARK: mark}
    return {**outer, **private, **extra}


@contextmanager
def private_home() -> Iterator[Path]:
    """A folder for Flower's and Ray's own files, which goes with them."""
    # Ray's sockets lie below it, and their paths may not be longer than 107 bytes.
    short = "/tmp" if len(tempfile.gettempdir()) > 12 and os.access("/tmp", os.W_OK) else None
    home = Path(tempfile.mkdtemp(prefix="fedsplit-", dir=short))
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def not_for_a_bundle(folder: str, names: list[str]) -> set[str]:
    """What no bundle may hold. Flower looks at every file below an app first: seconds for a .venv."""
    left_out = set()
    for name in names:
        path = os.path.join(folder, name)
        if os.path.islink(path):
            left_out.add(name)
        elif os.path.isdir(path):
            if name.startswith(".") or name in ("__pycache__", "build", "dist", "runs"):
                left_out.add(name)
        elif not name.endswith(BUNDLED):
            left_out.add(name)
    return left_out


def _start_superlink(home: Path, env: Mapping[str, str], cwd: Path | None) -> None:
    port, control = free_ports(2)
    log = home / "superlink.log"
    command = [tool("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--control-api-address", f"127.0.0.1:{control}"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=dict(env), cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    deadline = time.monotonic() + START_S
    while not _healthy(port):
        if process.poll() is not None or time.monotonic() > deadline:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
            raise FedsplitError(f"Flower's SuperLink did not start:\n{tail}")
        time.sleep(0.1)
    connection = (
        f'[superlink]\ndefault = "private"\n\n[superlink.private]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    (home / "config.toml").write_text(connection, encoding="utf-8")


def free_ports(count: int) -> list[int]:
    """Ports of this host that nobody listens on now."""
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in held]
    finally:
        for one in held:
            one.close()


def _healthy(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.5) as link:
        link.settimeout(1.0)
        link.sendall(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
        return b" 200 " in link.recv(64)
    return False


def _stream(
    command: Sequence[str], env: Mapping[str, str], cwd: Path | None, deadline: float, echo: Callable[[str], None]
) -> list[str]:
    """All output lines of a command, handed on as they come."""
    process = subprocess.Popen(
        command,
        env=dict(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    log: list[str] = []
    while True:
        try:
            # Short waits: a signal is handled between them.
            line = lines.get(timeout=0.5)
        except queue.Empty:
            if time.monotonic() > deadline:
                raise FedsplitError(f"The Flower run took too long.{_tail(log)}") from None
            continue
        if line is None:
            break
        log.append(re.sub(r"\x1b\[[0-9;]*m", "", line.rstrip()))
        echo(log[-1])
    if process.wait():
        raise FedsplitError(f"'flwr run' did not start the run.{_tail(log)}")
    return log


def _completed_run(env: Mapping[str, str], cwd: Path | None, log: Sequence[str]) -> str:
    """The id of the SuperLink's only run, if it completed."""
    found = subprocess.run(
        [tool("flwr"), "ls", "private", "--format", "json"], env=dict(env), cwd=cwd, capture_output=True, text=True
    )
    try:
        run = json.loads(found.stdout)["runs"][0]
        run_id, status = str(run["run-id"]), str(run["status"])
    except (ValueError, LookupError, TypeError):
        raise FedsplitError(f"Cannot learn how the Flower run ended: {found.stdout}{found.stderr}") from None
    if status != "finished:completed":
        raise FedsplitError(f"The Flower run ended as '{status}'.{_tail(log)}")
    return run_id


def _tail(log: Sequence[str], most: int = 15) -> str:
    """The lines worth reading: what each exception that ended the run says, else the last lines."""
    marks = [number for number, line in enumerate(log) if "Simulation raised an exception" in line]
    ended = [line for line in log[marks[-1] :] if re.match(r"[\w.]*\b[A-Z]\w*(: |$)", line)] if marks else []
    chosen = ended or [line for line in log if line.strip()][-most:]
    return "".join(f"\n  {line}" for line in chosen)


if __name__ == "__main__":
    sys.exit(main())
