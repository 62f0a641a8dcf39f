"""What runs on the hosts of `drills.hosts`: the server with its rounds, and a device that waits for jobs.

    python -m drills.host serve FOLDER ADDRESS NAMESPACE ...
    python -m drills.host device FOLDER NUMBER

What Flower's messages would carry goes through pipes, as lines of JSON; activations and gradients go over the stream.
The server measures each client's steps: the seconds that an exchange took at the device, less those in which the body
computed, beside what the virtual clock makes of the bytes and messages that were counted. So compute is in neither:
its prediction is `simulations/calibration.py`'s, and added to both sides it would only make the error look small.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drills.hosts import inside
from fedsplit import experiment
from fedsplit.config import Config, resolve
from fedsplit.deploy.certificates import certify
from fedsplit.devices.clock import cost
from fedsplit.runtime import device, half
from fedsplit.runtime.reception import REMOTE, Reception, served
from fedsplit.runtime.site import Site
from fedsplit.runtime.stream.packet import Kind
from fedsplit.types import Failure, Job, Report, Scalar, Update
from fedsplit.world import world

Handle = Callable[[Kind, int, bytes], tuple[int, bytes]]


@dataclass
class TimedBody(device.RemoteBody):
    """The server's body; `spent_s` are the seconds of each exchange with it."""

    spent_s: list[float] = field(default_factory=list)

    def _send(self, kind: Kind, noise: int, payload: bytes) -> tuple[int, bytes]:
        begun_s = time.perf_counter()
        try:
            return super()._send(kind, noise, payload)
        finally:
            self.spent_s.append(time.perf_counter() - begun_s)


@dataclass
class TimedServer:
    """A stream's server that notes, by client, the seconds in which its body computes for each packet."""

    inner: Any
    computed_s: dict[int, list[float]] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def expect(self, ticket: Any, make: Callable[[], Any], codecs: int) -> None:
        """As the server's own."""
        self.computed_s[ticket.client] = []

        def timed() -> Any:
            handler = make()
            handler.handle = self._timed(handler.handle, ticket.client)
            return handler

        self.inner.expect(ticket, timed, codecs)

    def _timed(self, handle: Handle, client: int) -> Handle:
        def timed(kind: Kind, value: int, payload: bytes) -> tuple[int, bytes]:
            begun_s = time.perf_counter()
            try:
                return handle(kind, value, payload)
            finally:
                self.computed_s[client].append(time.perf_counter() - begun_s)

        return timed


@dataclass
class Remote:
    """A runner: all devices at once, each in its own namespace."""

    config: Config
    reception: Reception
    clock: TimedServer
    devices: Sequence[subprocess.Popen[str]]
    keys: Sequence[bytes]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def run(self, jobs: Sequence[Job]) -> Iterator[Update | Failure]:
        """One result per job, in order."""
        with ThreadPoolExecutor(len(self.devices)) as pool:
            sent = [self.reception.invite(job, job.client, self.keys[job.client], 300.0) for job in jobs]
            for job, (answer, spent_s) in zip(jobs, pool.map(self._ask, sent), strict=True):
                if isinstance(answer, Update):
                    self.rows.append(self._row(job, answer.report, spent_s))
                yield self.reception.settle(job.client, answer)

    def _ask(self, sent: tuple[Job, device.Pass]) -> tuple[Update | Failure, list[float]]:
        job, given = sent
        process = self.devices[job.client]
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(written({"job": vars(job), "pass": vars(given)}))
        process.stdin.flush()
        answer = read(process.stdout.readline() or '{"failure": "its process is gone"}')
        if "failure" in answer:
            return Failure(job.client, answer["failure"]), []
        found = Update(**{**answer["update"], "report": Report(**answer["update"]["report"])})
        return found, answer["spent_s"]

    def _row(self, job: Job, report: Report, spent_s: list[float]) -> dict[str, Any]:
        # Models come and go through the pipe here, in two messages that no link has slowed down.
        streamed = {stream: count for stream, count in report.bytes.items() if stream in REMOTE}
        crossed = Report(bytes=streamed, messages=report.messages - 2)
        foreseen = cost(crossed, world(self.config).fleet[job.client])
        computed_s = self.clock.computed_s[job.client]
        link_s = [spent - computed for spent, computed in zip(spent_s, computed_s, strict=True)]
        return {
            "client": job.client, "round": job.round, "steps": report.steps, "bytes": sum(streamed.values()),
            "messages": crossed.messages, "exchanges_s": link_s, "server_s": sum(computed_s),
            "predicted_s": foreseen.seconds, "measured_s": sum(link_s), "wall_s": report.wall_s,
        }  # fmt: skip


def serve(folder: Path, address: str, spaces: Sequence[str]) -> None:
    """Serve the body at `address` to a device in each of `spaces`, and run the rounds; the values are in `folder`."""
    keys = folder / "keys"
    certify(keys, [address], 0)
    values: dict[str, Scalar] = json.loads((folder / "values.json").read_text())
    values |= {"link.listen": f"{address}:0", "link.certificate": str(keys / "server.pem")}
    values |= {"link.key": str(keys / "server.key"), "out": str(folder / "run"), "devices.count": len(spaces)}
    config = resolve(values)
    half.save(config, folder / "half.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(config.values)))
    devices = [_started(folder, number, space) for number, space in enumerate(spaces)]
    try:
        public = [base64.b64decode(one.stdout.readline()) for one in devices if one.stdout is not None]
        with served(config) as (server, where):
            clock = TimedServer(server)
            remote = Remote(config, Reception(config, clock, where), clock, devices, public)  # type: ignore[arg-type]
            experiment.run(config, remote)
        (folder / "measured.json").write_text(json.dumps(remote.rows))
    finally:
        for one in devices:
            one.kill()
            one.wait()


def _started(folder: Path, number: int, space: str) -> subprocess.Popen[str]:
    words = [*inside(space), sys.executable, "-m", "drills.host", "device", str(folder), str(number)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def serve_jobs(folder: Path, number: int) -> None:
    """Be device `number`: say its public key, then do one job a line until there are no more."""
    config = resolve(json.loads((folder / "config.json").read_text()))
    part, roots = folder / "half.safetensors", folder / "keys" / "ca.crt"
    count = config.devices.count
    site = Site(number, count, folder / f"device-{number}", part, None, roots, "", False)
    print(base64.b64encode(site.introduction()["public-key"]).decode(), flush=True)
    for line in sys.stdin:
        asked = read(line)
        print(written(_answer(config, asked, site)), end="", flush=True)


def _answer(config: Config, asked: Mapping[str, Any], site: Site) -> dict[str, Any]:
    bodies: list[TimedBody] = []

    def body(stream: Any) -> TimedBody:
        bodies.append(TimedBody(stream))
        return bodies[0]

    try:
        update = device.work(config, Job(**asked["job"]), device.Pass(**asked["pass"]), site, body)
    except Exception as error:
        return {"failure": f"{type(error).__name__}: {error}"}
    return {"update": {**vars(update), "report": update.report.as_dict()}, "spent_s": bodies[0].spent_s}


def written(value: Mapping[str, Any]) -> str:
    """A line of JSON; bytes are in base 64."""
    return json.dumps(value, default=lambda blob: {"bytes": base64.b64encode(blob).decode()}) + "\n"


def read(line: str) -> dict[str, Any]:
    """What `written` wrote."""

    def plain(found: dict[str, Any]) -> Any:
        return base64.b64decode(found["bytes"]) if set(found) == {"bytes"} else found

    found: dict[str, Any] = json.loads(line, object_hook=plain)
    return found


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        serve_jobs(Path(sys.argv[2]), int(sys.argv[3]))
