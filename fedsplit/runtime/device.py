"""A real device: what its ClientApp does with a message. Front and tail are here, the body is at the server.

Flower starts a new process for every message, so nothing lives in memory between rounds; the device's own
folder (`state` of its node config) holds its key and what it keeps (`fedsplit.runtime.drawer`).
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from fedsplit import personal
from fedsplit.client import device_round
from fedsplit.config import Config
from fedsplit.runtime import half, kept
from fedsplit.runtime.drawer import Drawer
from fedsplit.runtime.lines import keyed, peak_rss_bytes
from fedsplit.runtime.site import Site
from fedsplit.runtime.stream.client import StreamClient
from fedsplit.runtime.stream.limits import Limits
from fedsplit.runtime.stream.packet import Kind, fingerprint
from fedsplit.step import Body
from fedsplit.types import FedsplitError, Job, Update
from fedsplit.wire.codec import Codecs
from fedsplit.world import World, steered

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pass:
    """What a round's message says of the stream: where it is, the token for it, and the frozen weights' digest."""

    address: str
    token: bytes
    plaintext: bool
    frozen: str

    def stream(self, site: Site, config: Config, codecs: Codecs) -> StreamClient:
        """The device's end of the stream.

        Raises:
            FedsplitError: the server wants no TLS and this device does, or a certificate cannot be read.
        """
        if self.plaintext and not site.plaintext:
            raise FedsplitError(
                "The server serves the body without TLS, which this device refuses; "
                "set link.certificate and link.key at the server, or plaintext=true in the node config."
            )
        roots: bytes | Literal["plaintext"] | None = "plaintext" if self.plaintext else None
        if not self.plaintext and site.root_certificates:
            try:
                roots = site.root_certificates.read_bytes()
            except OSError as error:
                why = f"{site.root_certificates} cannot be read ({error.strerror})"
                raise FedsplitError(f"{why}; set 'root-certificates' in the node config.") from None
        link = config.link
        limits = Limits(packet_bytes=link.packet_bytes, idle_s=link.idle_s, session_s=config.engine.timeout_s)
        return StreamClient(
            self.address,
            self.token,
            site.key(),
            root_certificates=roots,
            codecs=codecs_mark(codecs),
            limits=limits,
            patience_s=link.patience_s,
        )


@dataclass
class RemoteBody:
    """The server's body, reached over a stream; `Body` of `fedsplit.step`."""

    stream: StreamClient

    def forward(self, activations: bytes, noise: int) -> bytes:
        """Activations down for activations up."""
        return self._send(Kind.FORWARD, noise, activations)[1]

    def backward(self, gradients: bytes) -> bytes:
        """The gradient at the cut for that at the body's output."""
        return self._send(Kind.BACKWARD, 0, gradients)[1]

    def learn(self, activations: bytes, noise: int) -> tuple[bytes, float]:
        """Vanilla split: the gradient at the cut, and the loss."""
        bits, frame = self._send(Kind.LEARN, noise, activations)
        return frame, float(struct.unpack("<d", struct.pack("<Q", bits))[0])

    def _send(self, kind: Kind, noise: int, payload: bytes) -> tuple[int, bytes]:
        return self.stream.exchange(kind, noise, payload)


def work(
    config: Config, job: Job, given: Pass, site: Site, body: Callable[[StreamClient], Body] = RemoteBody
) -> Update:
    """A client's round on this device; the body's side stays at the server, and so does what the server notes.

    A line of the log says how it went.

    Raises:
        FedsplitError: the device cannot do the job as it is set up, or the server refused its session.
    """
    begun_s = time.monotonic()
    try:
        update = _worked(config, job, given, site, body)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        log.warning("%s", keyed("round-failed", client=job.client, round=job.round, reason=reason))
        raise
    sent = update.report.bytes
    ways = {f"bytes_{way}": sum(size for name, size in sent.items() if name.endswith(way)) for way in ("up", "down")}
    facts = {"client": job.client, "round": job.round, "steps": update.report.steps}
    log.info(
        "%s", keyed("round-done", **facts, seconds=time.monotonic() - begun_s, **ways, peak_rss_bytes=peak_rss_bytes())
    )
    return update


def _worked(config: Config, job: Job, given: Pass, site: Site, body: Callable[[StreamClient], Body]) -> Update:
    if job.client % site.partitions != site.partition:
        raise FedsplitError(f"Client {job.client} is not of this device, number {site.partition} of {site.partitions}.")
    drawer = Drawer(site.state, job.client, keep=2 * config.engine.checkpoint_every + 2)
    job = replace(job, memory=drawer.read(job.memory))
    built = site.world(config, job.client)
    if half.frozen_digest(built) != given.frozen:
        raise FedsplitError("The device's frozen weights are not the server's; give it its half anew: fedsplit bundle.")
    stream = given.stream(site, config, steered(built, job.choices).codecs)
    try:
        with _outputs(built, site, job.client):
            update = device_round(built, job, body(stream), personal.watches(built)[0])
        stream.done()
    finally:
        stream.close()
    return replace(update, memory=drawer.write(update.memory))


@contextmanager
def _outputs(built: World, site: Site, client: int) -> Iterator[None]:
    """The kept outputs of a frozen front, if it is one, from the device's disk and back onto it."""
    if built.cache is None:
        yield
        return
    own = (site.data / "train.parquet").stat() if site.data else None
    file = kept.file_for(site.state, built, client, *((own.st_mtime_ns, own.st_size) if own else ()))
    before = kept.load(built.cache, file)
    yield
    try:
        kept.save(built.cache, file, before)
    except OSError as error:
        log.warning("cannot keep front outputs on disk (%s): they are computed again next time.", error.strerror)


def end_after(seconds: float) -> None:
    """End this process, which is one message's own, if it is still at work after `seconds`.

    Nobody waits for it any more, and its SuperNode takes no other message meanwhile.
    """
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()


def codecs_mark(codecs: Codecs) -> int:
    """A number for the codecs of all streams: both ends must have the same."""
    return fingerprint(repr(sorted((stream, tuple(stages)) for stream, stages in codecs.items())))
