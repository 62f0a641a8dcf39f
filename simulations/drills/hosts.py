"""Several hosts on one machine: network namespaces, joined by links with a bandwidth, a delay and losses.

A server's namespace, and one a device with a link of its own to it. The links are pairs of veth under `tc netem`, or,
where the kernel has no netem, cables of our own (`drills.cable`). Needs root. In each namespace a process of
`drills.host`: the server's serves the body over TLS and runs the rounds, a device's works on its jobs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsplit.runtime.processes import MARK, no_process_left
from fedsplit.types import Scalar

FOLDER = Path(__file__).resolve().parent
SERVER = "10.213.0.1"
Kind = str  # "netem" or "cable"


@dataclass(frozen=True)
class Quality:
    """What a link is like, either way; a rate of 0 is infinite, `loss` is a fraction of the packets."""

    down_bytes_per_s: float = 0.0
    up_bytes_per_s: float = 0.0
    latency_s: float = 0.0
    loss: float = 0.0


@dataclass
class Hosts:
    """The namespaces and what runs in them. Made by `hosts`."""

    names: list[str]
    mark: str
    processes: list[subprocess.Popen[Any]] = field(default_factory=list)

    @property
    def server(self) -> str:
        """The name of the server's namespace; those of the devices follow."""
        return self.names[0]

    def run(self, values: Mapping[str, Scalar], folder: Path, timeout_s: float = 300.0) -> list[dict[str, Any]]:
        """A run of `values` whose devices are these hosts, in `folder`; what each client's round took.

        The run folder is `folder/run`.

        Raises:
            RuntimeError: it failed, or took too long.
        """
        (folder / "values.json").write_text(json.dumps(dict(values)))
        log = folder / "hosts.log"
        with log.open("wb") as out:
            command = [*inside(self.server), sys.executable, "-m", "drills.host", "serve", str(folder)]
            done = subprocess.Popen(
                [*command, SERVER, *self.names[1:]],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
            try:
                code = done.wait(timeout_s)
            except subprocess.TimeoutExpired:
                code = None
        if code:
            raise RuntimeError(f"The run of several hosts failed:\n{log.read_text(errors='replace')[-3000:]}")
        if code is None:
            raise RuntimeError(f"The run took more than {timeout_s:g} s:\n{log.read_text(errors='replace')[-3000:]}")
        rows: list[dict[str, Any]] = json.loads((folder / "measured.json").read_text())
        return rows

    def environment(self) -> dict[str, str]:
        """For processes that must be gone when the hosts are."""
        paths = [str(FOLDER.parent), str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")]
        more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths)), MARK: self.mark}
        return {**os.environ, **more}

    def join(self, number: int, kind: Kind, quality: Quality) -> None:
        """Link device `number` to the server; its address is 10.213.1.(number + 1)."""
        own, server = f"fs{os.getpid()}d{number}", f"fs{os.getpid()}s{number}"
        if kind == "netem":
            command("ip", "link", "add", own, "type", "veth", "peer", "name", server)
        else:
            self._cable(number, own, server, quality)
        device, address = self.names[1 + number], f"10.213.1.{number + 1}"
        for name, space, its, peer in ((own, device, address, SERVER), (server, self.server, SERVER, address)):
            command("ip", "link", "set", name, "netns", space)
            command("ip", "-n", space, "link", "set", "lo", "up")
            command("ip", "-n", space, "address", "replace", f"{its}/32", "dev", "lo" if its == SERVER else name)
            command("ip", "-n", space, "link", "set", name, "up")
            command("ip", "-n", space, "route", "add", f"{peer}/32", "dev", name, "src", its)
        if kind == "netem":
            for name, space, rate in (
                (own, device, quality.up_bytes_per_s),
                (server, self.server, quality.down_bytes_per_s),
            ):
                command("tc", "-n", space, "qdisc", "add", "dev", name, "root", *netem(quality, rate))

    def _cable(self, number: int, own: str, server: str, quality: Quality) -> None:
        words = [sys.executable, str(FOLDER / "cable.py"), own, server, "--seed", str(number)]
        words += ["--rates", repr(quality.up_bytes_per_s), repr(quality.down_bytes_per_s)]
        words += ["--delay-s", repr(quality.latency_s), "--loss", repr(quality.loss)]
        cable = subprocess.Popen(
            words, env=self.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self.processes.append(cable)
        assert cable.stdout is not None
        if cable.stdout.readline() != b"ready\n":
            raise RuntimeError("A cable between two namespaces could not be made; see drills/cable.py.")


@contextmanager
def hosts(kind: Kind, qualities: list[Quality]) -> Iterator[Hosts]:
    """A server's host and one a quality; nothing of them is left afterwards.

    Raises:
        RuntimeError: this machine does not let us.
    """
    names = [f"fs{os.getpid()}-{name}" for name in ("server", *(f"device{n}" for n in range(len(qualities))))]
    made: list[str] = []
    with no_process_left() as mark:
        net = Hosts(names, mark)
        try:
            for name in names:
                command("ip", "netns", "add", name)
                made.append(name)
            for number, quality in enumerate(qualities):
                net.join(number, kind, quality)
            yield net
        finally:
            for process in net.processes:  # only cables: their devices go with them
                process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        pipe.close()
            for name in made:
                _forget(name)


def kinds() -> dict[Kind, str]:
    """Both kinds of link, and why this machine does not have them; empty for what it has."""
    if os.geteuid() != 0:
        return dict.fromkeys(("netem", "cable"), "network namespaces need root")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return dict.fromkeys(("netem", "cable"), f"there is no '{tool}' (install iproute2)")
    space = f"fs{os.getpid()}-try"
    try:
        command("ip", "netns", "add", space)
    except RuntimeError as error:
        return dict.fromkeys(("netem", "cable"), str(error))
    try:
        return {"netem": _tried(space, "netem"), "cable": _tried(space, "cable")}
    finally:
        _forget(space)


def _tried(space: str, kind: Kind) -> str:
    try:
        if kind == "netem":
            command("tc", "-n", space, "qdisc", "add", "dev", "lo", "root", *netem(Quality(latency_s=0.001), 1e6))
        elif not os.access("/dev/net/tun", os.R_OK | os.W_OK):
            return "there is no /dev/net/tun"
        else:
            command("ip", "-n", space, "tuntap", "add", "dev", "fstry", "mode", "tun")
    except RuntimeError as error:
        return str(error)
    return ""


def netem(quality: Quality, bytes_per_s: float) -> list[str]:
    """The words for `tc` of one direction."""
    words = ["netem", "delay", f"{1e6 * quality.latency_s:.0f}us", "loss", f"{100 * quality.loss:g}%"]
    return words + (["rate", f"{8 * bytes_per_s:.0f}bit"] if bytes_per_s else [])


def inside(space: str) -> list[str]:
    """What to put before a command that is to run in a namespace."""
    return ["ip", "netns", "exec", space]


def command(*words: str) -> None:
    """Run a command.

    Raises:
        RuntimeError: it failed, and what it said.
    """
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"'{' '.join(words)}' failed: {' '.join(done.stderr.split())}")


def _forget(space: str) -> None:
    for _ in range(20):  # a device of a namespace may go a moment after its process
        if not subprocess.run(["ip", "netns", "delete", space], capture_output=True).returncode:
            return
        time.sleep(0.1)
