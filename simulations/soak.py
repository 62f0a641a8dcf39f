"""Whether the process that serves the body stays as it is: devices come and go for half an hour.

    python simulations/soak.py [--minutes 30] [--sessions 20] [--quick]

This process serves the body of a small model over TLS; another one plays the devices, a thread each. A session takes
about 50 steps; their activations are random numbers, their frames real. Some sessions die between the passes of a
step, some come over a network that cuts their connections again and again; then the client has a ticket for the next
one. Every few seconds this process notes its resident memory, threads and open files. Prints one line of JSON last:
`slope_bytes_per_minute` is that of resident memory by least squares over the last four fifths.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from drills.cutter import Cutter

from fedsplit.config import Config, resolve
from fedsplit.deploy.certificates import certify
from fedsplit.runtime.device import codecs_mark
from fedsplit.runtime.reception import Reception, served
from fedsplit.runtime.stream.client import StreamClient
from fedsplit.runtime.stream.limits import Limits
from fedsplit.runtime.stream.packet import Kind
from fedsplit.types import Failure, FedsplitError, Job, Report, Update
from fedsplit.wire.frame import pack
from fedsplit.world import world

BATCH = 4
CUT_BYTES = (100_000, 3_000_000)
"""After so many bytes up the bad network drops a connection."""
Says = dict[str, Any]


@dataclass(frozen=True)
class Pace:
    """How long the soak is, how fast its devices are, and which fraction of sessions dies or has the bad network."""

    seconds: float
    sample_s: float
    steps: tuple[int, int]
    pause_s: float
    idle_s: float
    die: float
    cut: float


QUICK = Pace(12.0, 0.5, (5, 9), 0.05, 2.0, die=0.3, cut=0.5)


def main() -> None:
    """Serve, play, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long")
    parser.add_argument("--sessions", type=int, default=20, help="devices at once")
    parser.add_argument("--quick", action="store_true", help="12 seconds, and shorter sessions")
    parser.add_argument("--play", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.play:
        play(json.loads(sys.stdin.readline()))
        return
    pace = QUICK if options.quick else Pace(60 * options.minutes, 5.0, (40, 60), 0.5, 10.0, die=0.1, cut=0.2)
    with tempfile.TemporaryDirectory() as folder:
        found = soak(options.sessions, pace, Path(folder))
    print(json.dumps({"seconds": pace.seconds, "sessions": options.sessions, **found}))


# The server's process


def soak(sessions: int, pace: Pace, folder: Path) -> Says:
    """The figures of the server's process while devices come and go."""
    certify(folder / "keys", ["localhost", "127.0.0.1"], 0)
    config = resolve(
        {
            "model.name": "fedsplit_nano",
            "model.pretrained": False,
            "cut.front": 1,
            "cut.tail": 1,
            "data.limit": 10 * sessions,
            "data.test-limit": 10,
            "data.partition": "iid",
            "devices.count": sessions,
            "local.batch-size": BATCH,
            "rounds": 10**6,
            "link.listen": "127.0.0.1:0",
            "link.certificate": str(folder / "keys" / "server.pem"),
            "link.key": str(folder / "keys" / "server.key"),
            "link.sessions": sessions + 4,
            "link.idle-s": pace.idle_s,
        }
    )
    with served(config) as (server, address), players(config, address, folder, pace) as (child, heard):
        host = Host(config, Reception(config, server, address), child)
        watch(host, heard, pace)
        alive = Counter(one.state for one in server.sessions())
        assert child.stdin
        child.stdin.close()  # the end of the play
        child.wait(60)
        while not heard.empty():
            host.hear(heard.get())
        return host.result() | {"at_the_end": dict(alive)}


@contextmanager
def players(
    config: Config, address: str, folder: Path, pace: Pace
) -> Iterator[tuple[subprocess.Popen[str], queue.SimpleQueue[Says]]]:
    """The devices' process, and what it says, line by line."""
    command = [sys.executable, __file__, "--play"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin and child.stdout
        heard: queue.SimpleQueue[Says] = queue.SimpleQueue()
        said = threading.Thread(target=lambda: [heard.put(json.loads(line)) for line in child.stdout], daemon=True)
        said.start()
        plain = {name: value for name, value in config.values.items() if not name.startswith("link.")}
        start = {"config": plain, "address": address, "roots": str(folder / "keys" / "ca.crt"), **vars(pace)}
        say(child.stdin, start)
        try:
            yield child, heard
        finally:
            child.kill()
            said.join()
            with suppress(BrokenPipeError):
                child.stdin.close()


@dataclass
class Host:
    """Tickets for who wants one, an end for who is over, and the counts."""

    config: Config
    reception: Reception
    child: subprocess.Popen[str]
    keys: dict[int, bytes] = field(default_factory=dict)
    rounds: Counter[int] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    silent: set[int] = field(default_factory=set)
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)

    def hear(self, said: Says) -> None:
        """What the devices' process says of a client."""
        client = said.get("client", -1)
        for name in ("packets", "bytes", "cuts"):
            self.counts[name] += said.get(name, 0)
        if "key" in said:
            self.keys[client] = bytes.fromhex(said["key"])
            self.invite(client)
        elif said.get("ended") == "done":
            update = Update(client, 1, b"", b"", Report())
            result = self.reception.settle(client, update)
            self.count(client, "finished" if isinstance(result, Update) else "refused", result)
        elif said.get("ended") == "died":
            self.silent.add(client)  # nobody says so in life: the server finds out by itself
        elif said.get("ended"):
            self.count(client, "refused", self.reception.settle(client, Failure(client, said["ended"])))

    def bury(self) -> None:
        """An end for the sessions that are found to be over."""
        for client in [one for one in self.silent if self.reception.lost(one)]:
            self.silent.discard(client)
            self.count(client, "died", self.reception.settle(client, Failure(client, "it died")))

    def count(self, client: int, how: str, result: Update | Failure) -> None:
        """One session is over; the client has a ticket for the next."""
        self.counts[how] += 1
        if how == "refused":
            print(f"client {client}: {result}", file=sys.stderr, flush=True)
        self.invite(client)

    def invite(self, client: int) -> None:
        """A ticket for the client's next session."""
        built = world(self.config)
        self.rounds[client] += 1
        server = pack({name: built.initial[name] for name in built.server})
        job = Job(client, self.rounds[client], 0, b"", server)
        _, given = self.reception.invite(job, client, self.keys[client], 3600.0)
        assert self.child.stdin
        with suppress(BrokenPipeError, ValueError):  # the play is over
            say(self.child.stdin, {"client": client, "token": given.token.hex(), "round": job.round})
            self.counts["opened"] += 1

    def sample(self, at_s: float) -> None:
        """Note what this process holds."""
        me = psutil.Process()
        self.samples.append((at_s, me.memory_info().rss, me.num_threads(), me.num_fds()))

    def result(self) -> Says:
        """The figures of the whole soak."""
        table = np.array(self.samples, dtype=float)
        late = table[len(table) // 5 :]
        slope = np.polyfit(late[:, 0] / 60, late[:, 1], 1)[0] if len(late) > 1 else 0.0
        tenth = self.samples[len(self.samples) // 10]
        names = ("rss_bytes", "threads", "open_files")
        rows = {"start": self.samples[0], "after_a_tenth": tenth, "end": self.samples[-1]}
        return {
            **{name: dict(zip(names, row[1:], strict=True)) for name, row in rows.items()},
            "most": dict(zip(names, map(int, table[:, 1:].max(axis=0)), strict=True)),
            "slope_bytes_per_minute": round(float(slope)),
            "samples": len(self.samples),
            **{name: self.counts[name] for name in ("opened", "finished", "died", "refused", "cuts")},
            **{name: self.counts[name] for name in ("packets", "bytes")},
        }


def watch(host: Host, heard: queue.SimpleQueue[Says], pace: Pace) -> None:
    """Keep devices busy for the whole time, and take the samples; a line now and then."""
    begun: float | None = None
    spoke = sampled = 0.0
    while begun is None or time.monotonic() - begun < pace.seconds:
        with suppress(queue.Empty):
            host.hear(heard.get(timeout=0.1))
            begun = begun or time.monotonic()
        if host.child.poll() is not None:
            raise FedsplitError("The process that plays the devices has ended; its output says why.")
        host.bury()
        if begun is None or time.monotonic() - sampled < pace.sample_s:
            continue
        sampled = time.monotonic()
        host.sample(sampled - begun)
        if sampled - spoke > min(60.0, pace.seconds / 4):
            spoke = sampled
            at_s, rss, threads, files = host.samples[-1]
            print(
                f"{at_s / 60:5.1f} min  {rss / 1e6:7.1f} MB resident  {threads} threads  {files} open files  "
                f"{host.counts['finished']} sessions finished, {host.counts['died']} died, {host.counts['cuts']} cuts, "
                f"{host.counts['packets']} packets  about {max(0.0, pace.seconds - at_s) / 60:.1f} min left",
                flush=True,
            )


# The devices' process


def play(start: Mapping[str, Any]) -> None:
    """A thread for every device, until there are no more tickets."""
    config = resolve(start["config"])
    built = world(config)
    with torch.no_grad():
        images = torch.zeros(BATCH, 3, *built.data.train.pixels.shape[1:3])
        shape = built.parts.front(images, 0).shape
    draw = random.Random(1)
    bad = Cutter(start["address"], [draw.randint(*CUT_BYTES) for _ in range(10**6)])
    tickets: dict[int, queue.SimpleQueue[Says | None]] = {}
    out = threading.Lock()

    def tell(said: Says) -> None:
        with out:
            say(sys.stdout, said)

    for client in range(config.devices.count):
        tickets[client] = queue.SimpleQueue()
        device = Device(client, config, start, shape, bad)
        threading.Thread(target=device.work, args=(tickets[client], tell), daemon=True).start()
    before = 0
    for line in sys.stdin:
        said = json.loads(line)
        tickets[said["client"]].put(said)
        if (cuts := bad.cuts) > before:
            tell({"cuts": cuts - before})
            before = cuts


class Device:
    """One device: a session after another."""

    def __init__(self, client: int, config: Config, start: Mapping[str, Any], shape: torch.Size, bad: Cutter) -> None:
        self.client, self.config, self.start, self.shape, self.bad = client, config, start, shape, bad
        self.key = Ed25519PrivateKey.generate()
        self.draw = random.Random(client)
        self.torch_rng = torch.Generator().manual_seed(client)
        self.roots = Path(start["roots"]).read_bytes()
        self.counts: Counter[str] = Counter()

    def work(self, tickets: queue.SimpleQueue[Says | None], tell: Any) -> None:
        """Introduce itself, and take ticket after ticket."""
        tell({"client": self.client, "key": self.key.public_key().public_bytes_raw().hex()})
        while (ticket := tickets.get()) is not None:
            self.counts.clear()
            try:
                how = self.session(ticket)
            except FedsplitError as error:
                how = f"error: {error}"
            tell({"client": self.client, "ended": how, **self.counts})

    def session(self, ticket: Says) -> str:
        """Some steps with the body; how it ended."""
        built = world(self.config)
        link = built.link(ticket["round"], self.client)
        cut, dies = self.draw.random() < self.start["cut"], self.draw.random() < self.start["die"]
        steps = self.draw.randint(*self.start["steps"])
        last = self.draw.randrange(steps) if dies else -1
        stream = StreamClient(
            self.bad.address if cut else self.start["address"],
            bytes.fromhex(ticket["token"]),
            self.key,
            root_certificates=self.roots,
            codecs=codecs_mark(built.codecs),
            limits=Limits(),
        )
        try:
            for step in range(steps):
                up = link.encode("activations-up", {"x": torch.randn(self.shape, generator=self.torch_rng)})
                down = link.decode("activations-down", self.exchange(stream, Kind.FORWARD, up))
                if step == last:
                    return "died"
                up = link.encode("gradients-up", {"x": 0.01 * torch.randn(down["x"].shape, generator=self.torch_rng)})
                link.decode("gradients-down", self.exchange(stream, Kind.BACKWARD, up))
                time.sleep(self.start["pause_s"] * self.draw.uniform(0.5, 1.5))
            stream.done()
        finally:
            stream.close()
        return "done"

    def exchange(self, stream: StreamClient, kind: Kind, payload: bytes) -> bytes:
        """A round trip, counted."""
        reply = stream.exchange(kind, self.draw.getrandbits(32), payload)[1]
        self.counts["packets"] += 1
        self.counts["bytes"] += len(payload) + len(reply)
        return reply


def say(to: IO[str], what: Mapping[str, Any]) -> None:
    """One line of JSON."""
    to.write(json.dumps(what) + "\n")
    to.flush()


if __name__ == "__main__":
    main()
