"""One client's session as a state machine, without sockets, threads or grpc. `docs/link.md` draws it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from fedsplit.runtime.stream.limits import LEAST_BYTES_PER_S, Bucket, Limits
from fedsplit.runtime.stream.packet import Kind, Packet
from fedsplit.runtime.stream.ticket import Ticket
from fedsplit.types import FedsplitError

WORK = (Kind.FORWARD, Kind.BACKWARD, Kind.LEARN)
RECENT = 32


class Handler(Protocol):
    """The body's side of one session; only the server's one compute thread calls it."""

    def handle(self, kind: Kind, value: int, payload: bytes) -> tuple[int, bytes]:
        """Value (64 bits) and payload of the reply.

        Raises:
            FedsplitError: told to the peer. Anything else is told as "internal error" and logged.
        """

    def close(self) -> None:
        """The session is gone without DONE, or nobody asked for it: forget everything."""


class State(StrEnum):
    """Where a session is."""

    EXPECTED = "expected"
    OPEN = "open"
    AWAY = "away"
    DONE = "done"
    GONE = "gone"


@dataclass(frozen=True)
class Figures:
    """A session as a table shows it. `since_s` is the seconds since it was opened (expected: since then), `silent_s`
    those since the peer was last heard.

    `packets` and bytes count all that crossed, resent ones too; `server_s` was spent in the handler;
    `round_trips_per_s` is that of the last ones.
    """

    node: int
    client: int
    round: int
    state: str
    since_s: float
    packets: int
    up_bytes: int
    down_bytes: int
    round_trips_per_s: float
    server_s: float
    last_error: str
    silent_s: float


@dataclass(frozen=True)
class Event:
    """Something that happened to a session: it was expected, opened, lost, resumed, done or dismissed."""

    what: str
    node: int
    client: int
    round: int
    reason: str = ""


class Pending:
    """A packet that is to be, or was, handled; its reply, and a gate that opens with it."""

    def __init__(self, packet: Packet) -> None:
        self.packet: Packet | None = packet
        self.reply: Packet | None = None
        self.kind, self.sequence = packet.kind, packet.sequence
        self._like = (packet.kind, packet.value, packet.check)
        self._gate = threading.Lock()
        self._gate.acquire()

    def answer(self, reply: Packet) -> None:
        """Keep the reply, the first one only, forget the packet, and wake who waits."""
        if self.reply is None:
            self.reply, self.packet = reply, None
            self._gate.release()

    def wait(self, seconds: float) -> bool:
        """Whether the reply is there, after at most so many seconds."""
        if not self._gate.acquire(timeout=seconds):
            return False
        self._gate.release()
        return True

    def like(self, packet: Packet) -> bool:
        """Whether `packet` is this one again."""
        return self._like == (packet.kind, packet.value, packet.check)


class Session:
    """The server's side of one session: what may come next, what was answered last, and when it is overdue.

    Times are of one monotonic clock. Not safe for threads: the server holds a lock around every call.
    """

    def __init__(self, ticket: Ticket, make: Callable[[], Handler], codecs: int, limits: Limits, now_s: float) -> None:
        self.ticket, self.make, self.codecs, self.limits = ticket, make, codecs, limits
        self.state = State.EXPECTED
        self.handler: Handler | None = None
        self.stream: object | None = None
        self.last: Pending | None = None
        self.last_error = ""
        self.packets = self.up_bytes = self.down_bytes = 0
        self.server_s = 0.0
        self._since_s = self._heard_s = now_s
        self._replied_s: deque[float] = deque(maxlen=RECENT)
        self._rates = (
            Bucket(limits.bytes_per_s, max(limits.bytes_per_s, limits.chunk_bytes), now_s),
            Bucket(limits.packets_per_s, max(limits.packets_per_s, 1.0), now_s),
        )

    @property
    def sequence(self) -> int:
        """The number of the last packet that was taken; 0 before the first."""
        return self.last.sequence if self.last else 0

    @property
    def busy(self) -> bool:
        """Whether the last packet waits for its reply."""
        return self.last is not None and self.last.reply is None

    def attach(self, stream: object, now_s: float) -> object | None:
        """An authorised stream carries the session from now on; the stream that did so before, if any."""
        if self.state is State.GONE:
            raise FedsplitError("The session is over.")
        if self.state is State.EXPECTED:
            self._since_s = now_s
        if self.state is not State.DONE:
            self.state = State.OPEN
        self._heard_s = now_s
        before, self.stream = self.stream, stream
        return before

    def detach(self, stream: object) -> bool:
        """A stream ended: the session waits for another one, if it was carried by this one; whether it now does."""
        if self.stream is not stream:
            return False
        self.stream = None
        if self.state is State.OPEN:
            self.state = State.AWAY
        return self.state is State.AWAY

    def progress(self, up_bytes: int, down_bytes: int, now_s: float) -> None:
        """A part of a packet passed: the peer is as little silent as it is fast."""
        self.up_bytes += up_bytes
        self.down_bytes += down_bytes
        self._heard_s = min(now_s, self._heard_s + (up_bytes + down_bytes) / LEAST_BYTES_PER_S)

    def toll(self, up_bytes: int, packets: int, now_s: float) -> float:
        """Seconds that the peer has to wait before more of it is read; they do not count as silence."""
        wait = max(self._rates[0].take(up_bytes, now_s), self._rates[1].take(packets, now_s))
        self._heard_s += wait
        return wait

    def receive(self, packet: Packet, now_s: float) -> tuple[Pending, bool]:
        """Take a packet: what answers it, and whether it is new and has to be handled.

        Raises:
            FedsplitError: it may not come now. The stream ends, the session stays as it is.
        """
        self.packets += 1
        self._heard_s = max(self._heard_s, now_s)
        if self.state in (State.GONE, State.EXPECTED):
            raise FedsplitError("The session is over.")
        if packet.codecs != self.codecs:
            raise FedsplitError("Device and server have different codecs: give both the same wire settings.")
        if packet.kind is not Kind.DONE and packet.kind not in WORK:
            raise FedsplitError(f"A packet of kind {packet.kind.name} does not belong here.")
        if self.last is not None and packet.sequence == self.sequence:
            if not self.last.like(packet):
                raise FedsplitError(f"Packet {packet.sequence} came twice, and is not the same.")
            return self.last, False
        if packet.sequence != self.sequence + 1 or self.busy or self.state is State.DONE:
            raise FedsplitError(
                f"Packet {packet.sequence} is out of order: the last one was {self.sequence}"
                + (" and is not answered." if self.busy else ", and said that it was the last." * self.is_done or ".")
            )
        self.last = Pending(packet)
        return self.last, True

    @property
    def is_done(self) -> bool:
        """Whether the peer said DONE."""
        return self.state is State.DONE

    def answered(self, pending: Pending, reply: Packet, server_s: float, now_s: float) -> bool:
        """The handler's reply to the last packet; whether the session still wants it."""
        self.server_s += server_s
        self._heard_s = now_s
        if self.state is State.GONE:
            return False
        if pending.kind is Kind.DONE:
            self.state = State.DONE
        self._replied_s.append(now_s)
        pending.answer(reply)
        return True

    def end(self, reason: str) -> object | None:
        """The session is gone; the stream that carried it, if any. Who waits for a reply is told."""
        self.state, self.last_error = State.GONE, reason or self.last_error
        if self.last is not None:
            self.last.answer(self.error("The session is over."))
            self.last = None
        stream, self.stream = self.stream, None
        return stream

    def error(self, line: str) -> Packet:
        """An ERROR packet with one short line."""
        return Packet(Kind.ERROR, self.sequence, 0, self.codecs, " ".join(line.split())[:300].encode())

    def overdue(self, now_s: float) -> str:
        """Why the session should end now; empty if it should not."""
        if self.state is State.EXPECTED:
            return "The session was not opened before its token expired." if now_s >= self.ticket.expires_s else ""
        if self.state is State.DONE:
            # Its reply may be asked for again; what nobody has fetched stays.
            return "Done." if self.handler is None and now_s - self._heard_s > self.limits.idle_s else ""
        if now_s - self._since_s > self.limits.session_s:
            return f"The session took more than {self.limits.session_s:g} s."
        if not self.busy and now_s - self._heard_s > self.limits.idle_s:
            return f"The peer was silent for {self.limits.idle_s:g} s."
        return ""

    def figures(self, now_s: float) -> Figures:
        """The session now."""
        recent = self._replied_s
        rate = len(recent) / max(now_s - recent[0], 1e-9) if len(recent) > 1 else 0.0
        return Figures(
            self.ticket.node,
            self.ticket.client,
            self.ticket.round,
            str(self.state),
            now_s - self._since_s,
            self.packets,
            self.up_bytes,
            self.down_bytes,
            rate,
            self.server_s,
            self.last_error,
            max(0.0, now_s - self._heard_s),
        )

    def event(self, what: str, reason: str = "") -> Event:
        """Something that happens to it; `reason` on one line."""
        ticket = self.ticket
        return Event(what, ticket.node, ticket.client, ticket.round, " ".join(reason.split())[:300])
