"""A whole deployment on one machine: SuperLink, SuperNodes and a run, each in real processes, over TLS.

For tests, for fault drills, and to try a deployment before there are devices. The SuperLink keeps its state in a
database; every SuperNode has a key of its own, and its device a folder of its own.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from fedsplit.config import to_toml
from fedsplit.deploy.certificates import certify
from fedsplit.runtime.processes import no_process_left
from fedsplit.runtime.superlink import (
    START_S,
    environment,
    free_ports,
    make_absolute,
    not_for_a_bundle,
    private_home,
    tool,
)
from fedsplit.types import FedsplitError, Scalar

CONNECTION = "local"
ENDED = "finished:"
ASK_S = 20.0


@dataclass
class LocalNet:
    """The processes of one deployment; `home` holds certificates, database, logs and the devices' folders.

    `node_config` are more keys for the SuperNodes. Made by `local_net`.
    """

    home: Path
    nodes: int
    env: dict[str, str]
    app: Path
    node_config: Mapping[str, Scalar] = field(default_factory=dict)
    port: int = 0
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Host and port of the SuperLink."""
        return f"127.0.0.1:{self.port}"

    def start_superlink(self) -> None:
        """Start the SuperLink, or start it again on its database.

        Raises:
            FedsplitError: it did not come up.
        """
        self.port = self.port or free_ports(1)[0]
        command = [tool("flower-superlink"), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key"]
        command += ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
        self._start("superlink", [*command, "--database", str(self.home / "state.db")], cwd=self.home / "keys")
        deadline = time.monotonic() + START_S
        while self._flwr("supernode", "ls", CONNECTION) is None:
            if self.processes["superlink"].poll() is not None or time.monotonic() > deadline:
                raise FedsplitError(f"Flower's SuperLink did not start:\n{self.log('superlink')[-1500:]}")
            time.sleep(0.2)

    def register(self) -> None:
        """Make the SuperNodes' keys known to the SuperLink."""
        for number in range(self.nodes):
            key = self.home / "keys" / f"node-{number}.pub"
            if self._flwr("supernode", "register", str(key), CONNECTION, "--name", f"node-{number}") is None:
                raise FedsplitError(f"SuperNode {number} could not be registered:\n{self.log('superlink')[-1500:]}")

    def start_node(self, number: int) -> None:
        """Start SuperNode `number`, or start it again with the same key."""
        keys = self.home / "keys"
        config = {"partition-id": number, "num-partitions": self.nodes, "state": str(self.home / f"device-{number}")}
        config |= {"root-certificates": str(keys / "ca.crt"), **self.node_config}
        command = [tool("flower-supernode"), "--root-certificates", str(keys / "ca.crt")]
        command += ["--superlink", self.address, "--host", "127.0.0.1", "--port", str(free_ports(1)[0])]
        command += ["--auth-supernode-private-key", str(keys / f"node-{number}")]
        words = (f'{name}="{value}"' if isinstance(value, str) else f"{name}={value}" for name, value in config.items())
        self._start(f"node-{number}", [*command, "--node-config", " ".join(words)], cwd=self.home)

    def submit(self, values: Mapping[str, Scalar], name: str = "run") -> str:
        """Submit a run with these run config values; its id.

        Raises:
            FedsplitError: the SuperLink did not take it.
        """
        file = self.home / f"{name}.toml"
        plain = dict(values)
        make_absolute(plain, Path.cwd())
        plain |= {"link.listen": "127.0.0.1:0"} if "link.listen" not in plain else {}
        if not plain.get("link.plaintext"):
            keys = self.home / "keys"
            plain |= {"link.certificate": str(keys / "server.pem"), "link.key": str(keys / "server.key")}
        file.write_text(to_toml(plain), encoding="utf-8")
        said = self._flwr("run", str(self.app), CONNECTION, "--run-config", str(file), "--format", "json")
        try:
            return str(json.loads(said or "")["run-id"])
        except (ValueError, KeyError, TypeError):
            raise FedsplitError(
                f"The SuperLink did not take the run: {said}\n{self.log('superlink')[-1500:]}"
            ) from None

    def status(self, run_id: str) -> str:
        """The status of a run as Flower says it; empty where the SuperLink does not answer."""
        said = self._flwr("ls", CONNECTION, "--run-id", run_id, "--format", "json")
        with suppress(ValueError, LookupError, TypeError):
            return str(json.loads(said or "")["runs"][0]["status"])
        return ""

    def wait(self, run_id: str, timeout_s: float, watch: Callable[[], None] = lambda: None) -> str:
        """Wait for the end of a run, calling `watch` meanwhile; its last status.

        Raises:
            FedsplitError: it took more than `timeout_s` seconds.
        """
        begun = asked = time.monotonic()
        seen, status = False, ""
        while not status.startswith(ENDED):
            now = time.monotonic()
            if now - begun > timeout_s:
                raise FedsplitError(f"The run took more than {timeout_s:g} s.\n{self.run_log(run_id)[-2000:]}")
            watch()
            time.sleep(0.3)
            # To ask starts a process of Flower's: only where the ServerApp is gone, or has never been seen.
            here = bool(self.find("flwr-serverapp", "superlink"))
            if (seen and not here) or now - asked > ASK_S:
                status, asked = self.status(run_id), time.monotonic()
            seen = seen or here
        return status

    def stop(self, run_id: str) -> None:
        """Tell Flower to stop a run, if it does not know yet that it is over."""
        self._flwr("stop", run_id, CONNECTION)

    def run(self, values: Mapping[str, Scalar], timeout_s: float = 600.0) -> str:
        """Submit a run and wait until it has completed; its id.

        Raises:
            FedsplitError: it failed, or took too long.
        """
        run_id = self.submit(values)
        status = self.wait(run_id, timeout_s)
        if status != "finished:completed":
            raise FedsplitError(f"The Flower run ended as '{status}'.\n{self.run_log(run_id)[-3000:]}")
        return run_id

    def run_log(self, run_id: str) -> str:
        """What the ServerApp of a run printed."""
        return self._flwr("log", run_id, CONNECTION, "--show") or ""

    def log(self, name: str) -> str:
        """What a process printed: "superlink" or "node-0" …"""
        file = self.home / f"{name}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to a process that this deployment started, and to those that it started in turn."""
        process = self.processes.pop(name)
        with suppress(psutil.Error):
            children = psutil.Process(process.pid).children(recursive=True)
            for one in (psutil.Process(process.pid), *children):
                with suppress(psutil.Error):
                    one.send_signal(number)
        process.wait()

    def find(self, word: str, below: str) -> list[psutil.Process]:
        """The processes that `below` ("superlink", "node-0" …) started, with `word` in their command line."""
        found = []
        if below in self.processes:
            with suppress(psutil.Error):
                for child in psutil.Process(self.processes[below].pid).children(recursive=True):
                    with suppress(psutil.Error):
                        if any(word in part for part in child.cmdline()):
                            found.append(child)
        return found

    def _start(self, name: str, command: list[str], cwd: Path) -> None:
        with (self.home / f"{name}.log").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                command,
                env=self.env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _flwr(self, *words: str) -> str | None:
        done = subprocess.run(
            [tool("flwr"), *words],
            env=self.env,
            cwd=self.home,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        return done.stdout if not done.returncode else None


@contextmanager
def local_net(
    app: Path,
    nodes: int,
    *,
    node_config: Mapping[str, Scalar] | None = None,
    env: Mapping[str, str] | None = None,
    home: Path | None = None,
) -> Iterator[LocalNet]:
    """A deployment of the Flower app in `app` with `nodes` SuperNodes, up and registered; nothing of it is left.

    Raises:
        FedsplitError: a part of it did not start.
    """
    with private_home() as private, no_process_left() as mark:
        place = home or private
        place.mkdir(parents=True, exist_ok=True)
        certify(place / "keys", ["localhost", "127.0.0.1"], nodes)
        variables = environment(private, mark, {"OMP_NUM_THREADS": "1", **(env or {})})
        net = LocalNet(place, nodes, variables, _bundled(app, place), node_config or {})
        net.port = free_ports(1)[0]
        connection = f'[superlink.{CONNECTION}]\naddress = "{net.address}"\nroot-certificates = "{place}/keys/ca.crt"\n'
        (private / "config.toml").write_text(f'[superlink]\ndefault = "{CONNECTION}"\n\n{connection}', encoding="utf-8")
        net.start_superlink()
        net.register()
        for number in range(nodes):
            net.start_node(number)
        yield net


def _bundled(app: Path, place: Path) -> Path:
    import shutil

    target = place / "app"
    if not target.exists():
        shutil.copytree(app, target, ignore=not_for_a_bundle)
    return target
