"""Where devices come for the body: tickets out, seats kept, and what a client did there fetched, or thrown away.

It knows the stream but not Flower, so that a round can be had over any messages. A seat at the body
(`fedsplit.body.seat`) is merged only if its client's update comes, and is let in: a session that dies leaves nothing.
"""

from __future__ import annotations

import logging
import secrets
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fedsplit import personal
from fedsplit.body.seat import Seat
from fedsplit.config import Config
from fedsplit.runtime.device import Pass, codecs_mark
from fedsplit.runtime.drawer import check_receipt
from fedsplit.runtime.half import frozen_digest
from fedsplit.runtime.stream.limits import Limits
from fedsplit.runtime.stream.packet import Kind
from fedsplit.runtime.stream.server import Event, StreamServer
from fedsplit.runtime.stream.ticket import TOKEN_BYTES, Ticket
from fedsplit.types import STREAMS, Failure, FedsplitError, Job, Stream, Tensors, Update
from fedsplit.wire.codec import PARAMETERS
from fedsplit.world import World, steered, world

log = logging.getLogger(__name__)
REMOTE = tuple(stream for stream in STREAMS if stream not in PARAMETERS)


class BodyHandler:
    """One session with the body, for the stream's server: packets in, frames out, one step at a time."""

    def __init__(self, built: World, job: Job) -> None:
        seen = personal.watches(built)[1]
        self.seat = Seat.take(steered(built, job.choices), job, tap=_sound, watch=seen, own=True)
        self._vanilla = built.config.cut.shape == "vanilla"
        self._forwarded, self._job = False, job

    def handle(self, kind: Kind, value: int, payload: bytes) -> tuple[int, bytes]:
        """The reply to a packet.

        Raises:
            FedsplitError: the packet is none of this run's, or comes out of turn.
        """
        body = self.seat.body
        if self._vanilla != (kind is Kind.LEARN) or (kind is Kind.BACKWARD and not self._forwarded):
            raise FedsplitError(f"A packet of kind {kind.name} is out of turn; the device must run the same config.")
        self._forwarded = kind is Kind.FORWARD
        try:
            if kind is Kind.FORWARD:
                return 0, body.forward(payload, value)
            if kind is Kind.BACKWARD:
                return 0, body.backward(payload)
            frame, loss = body.learn(payload, value)
        except (RuntimeError, ValueError, TypeError, LookupError) as error:  # what torch says to odd shapes and plans
            log.info("a packet does not fit the body", exc_info=True)
            raise FedsplitError(f"A packet does not fit the body: {str(error).splitlines()[0][:200]}") from None
        return int(struct.unpack("<Q", struct.pack("<d", loss))[0]), frame

    def close(self) -> None:
        """Nothing outlives the seat."""

    def complete(self, update: Update) -> Update:
        """The device's update with the server's side of it; of what both counted, the server's figures."""
        server, notes = self.seat.leave()
        link, report = self.seat.body.link, update.report
        counted: dict[str, int] = {stream: link.sizes[stream] for stream in REMOTE}
        counted |= {"parameters-down": len(self._job.down), "parameters-up": len(update.up)}
        raw: dict[str, int] = {stream: link.raw[stream] for stream in REMOTE}
        report = replace(
            report,
            bytes={**report.bytes, **counted},
            raw_bytes={**report.raw_bytes, **raw},
            server_peak_bytes=self.seat.peak_bytes,
        )
        return replace(update, server=server, notes=notes, report=report)


@dataclass
class Reception:
    """The sessions of a run's clients with the body that `server` serves at `address`."""

    config: Config
    server: StreamServer
    address: str
    _tokens: dict[int, bytes] = field(default_factory=dict)

    def invite(self, job: Job, node: int, public_key: bytes, within_s: float) -> tuple[Job, Pass]:
        """What the device `node` is sent of a job, and its pass to the body, good for `within_s` seconds."""
        built = world(self.config)
        token = self._tokens[job.client] = secrets.token_bytes(TOKEN_BYTES)
        ticket = Ticket(token, node, job.client, job.round, public_key, time.monotonic() + within_s)
        codecs = steered(built, job.choices).codecs
        self.server.expect(ticket, lambda: BodyHandler(built, job), codecs_mark(codecs))
        given = Pass(self.address, token, self.config.link.plaintext, frozen_digest(built))
        return replace(job, server=b"", notes=b""), given

    def settle(self, client: int, result: Update | Failure) -> Update | Failure:
        """What a device's answer amounts to with the server's side of it; the session is over."""
        token = self._tokens.pop(client)
        handler = self.server.finished(token) if isinstance(result, Update) else None
        reason = self.server.lost(token)
        self.server.dismiss(token)
        if isinstance(result, Failure):
            return result
        if not isinstance(handler, BodyHandler):
            return Failure(client, f"its session with the body did not end well: {reason or 'it is not done'}")
        try:
            check_receipt(result.memory)
        except FedsplitError as error:
            return Failure(client, str(error))
        return handler.complete(result)

    def lost(self, client: int) -> str:
        """Why the session of a client that has not answered is over; empty while it is not."""
        return self.server.lost(self._tokens[client])

    def close(self) -> None:
        """Dismiss who is still there."""
        while self._tokens:
            self.server.dismiss(self._tokens.popitem()[1])


def _sound(stream: Stream, tensors: Tensors) -> None:
    """Whether what a device sent may meet the body at all.

    Raises:
        FedsplitError: it holds a value that is not finite.
    """
    for name, x in tensors.items():
        if x.is_floating_point() and not torch.isfinite(x).all():
            raise FedsplitError(f"'{name}' ({stream}) holds values that are not finite; lower optimizer.lr.")


@contextmanager
def served(
    config: Config, on_event: Callable[[Event], None] = lambda event: None
) -> Iterator[tuple[StreamServer, str]]:
    """A stream server by the keys of `link`, and the address by which devices reach it; `on_event` as there.

    Raises:
        FedsplitError: keys of `link` that cannot be used.
    """
    link = config.link
    limits = Limits(
        sessions=link.sessions,
        packet_bytes=link.packet_bytes,
        idle_s=link.idle_s,
        session_s=config.engine.timeout_s,
        bytes_per_s=link.bytes_per_s,
        packets_per_s=link.packets_per_s,
    )
    server = StreamServer(link.listen, limits, _certificate(config), on_event)
    port = server.start()
    try:
        yield server, link.address or f"{link.listen.rpartition(':')[0]}:{port}"
    finally:
        server.stop()


def _certificate(config: Config) -> tuple[bytes, bytes] | None:
    if config.link.plaintext:
        return None
    found = []
    for name, path in (("certificate", config.link.certificate), ("key", config.link.key)):
        try:
            found.append(Path(path).expanduser().read_bytes())
        except OSError as error:
            why = f"link.{name}='{path}' cannot be read ({error.strerror})"
            raise FedsplitError(f"{why}; fedsplit certify makes it.") from None
    return found[0], found[1]
