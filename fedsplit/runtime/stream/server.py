"""The server's end of the stream: sessions of devices over gRPC, one compute thread for all of them.

A synchronous gRPC server keeps a thread for every stream, so it has as many as there may be sessions, and a few
for streams that have not shown a token yet; what comes on top is refused at once.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from fedsplit.runtime.stream.channel import METHOD, SERVER_OPTIONS, SERVICE, credentials
from fedsplit.runtime.stream.compute import Compute
from fedsplit.runtime.stream.limits import OPENING_S, Limits, Pace
from fedsplit.runtime.stream.packet import Assembler, Kind, Packet, chunks
from fedsplit.runtime.stream.session import Event, Figures, Handler, Pending, Session, State
from fedsplit.runtime.stream.streams import Refused, Stream, first, one_line, place
from fedsplit.runtime.stream.ticket import CHALLENGE_BYTES, TOKEN_BYTES, Ticket, proves
from fedsplit.types import FedsplitError

__all__ = ["Event", "Figures", "Handler", "Limits", "StreamServer", "Ticket"]

SPARE = 8
"""Streams that may be without an authorised session: they are being opened, or were replaced."""
NO_ENTRY = "This token does not open a session here."
log = logging.getLogger(__name__)


class StreamServer:
    """Serves sessions that were announced by `expect`.

    Args:
        listen: address and port, e.g. "0.0.0.0:9443"; port 0 takes a free one.
        limits: of every session and of all together.
        tls: certificate chain and private key (PEM); None serves plaintext.
        on_event: told of what happens to sessions, with the server's lock held: it must return at once, and ask
            nothing of the server.
    """

    def __init__(
        self,
        listen: str,
        limits: Limits,
        tls: tuple[bytes, bytes] | None,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self._on_event = on_event
        self._listen, self._limits, self._tls = listen, limits, tls
        self._lock = threading.Lock()
        self._sessions: dict[bytes, Session] = {}
        self._reasons: dict[bytes, str] = {}  # of sessions that ended by themselves, until they are dismissed
        self._past: deque[Figures] = deque(maxlen=limits.sessions)
        self._streams: set[Stream] = set()
        self._compute = Compute()
        self._stopped = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, name="fedsplit-watchdog", daemon=True)
        self._grpc: Any = None

    def start(self) -> int:
        """Serve; the port.

        Raises:
            FedsplitError: the certificate or its key is unreadable, or the address cannot be had.
        """
        secure = credentials(self._tls) if self._tls else None
        workers = self._limits.sessions + 2 * SPARE
        pool = ThreadPoolExecutor(workers, thread_name_prefix="fedsplit-stream")
        server = grpc.server(pool, options=SERVER_OPTIONS, maximum_concurrent_rpcs=workers)
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        try:
            port = server.add_secure_port(self._listen, secure) if secure else server.add_insecure_port(self._listen)
        except RuntimeError:
            port = 0
        if not port:
            raise FedsplitError(f"Cannot listen on {self._listen}: the address is taken or not of this machine.")
        self._grpc = server
        server.start()
        self._compute.start()
        self._watchdog.start()
        return int(port)

    def expect(self, ticket: Ticket, make: Callable[[], Handler], codecs: int) -> None:
        """From now on a session may be opened with this ticket; `make` is called in the compute thread.

        Raises:
            FedsplitError: the token has the wrong length or is in use.
        """
        if len(ticket.token) != TOKEN_BYTES:
            raise FedsplitError(f"A token has {TOKEN_BYTES} bytes, not {len(ticket.token)}.")
        with self._lock:
            if place(ticket.token) in self._sessions:
                raise FedsplitError("This token is in use: draw a new one for every session.")
            session = Session(ticket, make, codecs, self._limits, time.monotonic())
            self._sessions[place(ticket.token)] = session
            self._on_event(session.event("expected"))

    def dismiss(self, token: bytes) -> None:
        """Token and session are void; their handler is closed in the compute thread."""
        with self._lock:
            if session := self._sessions.get(place(token)):
                self._end(session, "")
            self._reasons.pop(place(token), None)

    def finished(self, token: bytes) -> Handler | None:
        """The handler of a session that said DONE, handed out once."""
        with self._lock:
            session = self._sessions.get(place(token))
            if session is None or session.state is not State.DONE:
                return None
            handler, session.handler = session.handler, None
            return handler

    def lost(self, token: bytes) -> str:
        """Why the session with this token has ended, if it has; empty once it is dismissed."""
        with self._lock:
            return self._reasons.get(place(token), "")

    def sessions(self) -> list[Figures]:
        """All sessions, and the last ones that have ended."""
        with self._lock:
            now_s = time.monotonic()
            return [*self._past, *(session.figures(now_s) for session in self._sessions.values())]

    def stop(self) -> None:
        """End all streams and sessions; handlers that nobody fetched are closed before it returns."""
        if self._stopped.is_set() or self._grpc is None:
            return
        self._stopped.set()
        with self._lock:
            for session in list(self._sessions.values()):
                self._end(session, "The server stopped.")
        self._grpc.stop(None).wait()
        self._watchdog.join()
        self._compute.stop()

    # One stream, in its own thread

    def _serve(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """What gRPC calls for a stream: its messages in, ours out."""
        stream = Stream(context, time.monotonic() + min(OPENING_S, self._limits.idle_s))
        try:
            self._enter(stream)
            challenge = secrets.token_bytes(CHALLENGE_BYTES)
            yield from chunks(Packet(Kind.HELLO, payload=challenge))
            opening = first(requests)
            session = self._admit(stream, opening, challenge)
            yield from chunks(Packet(Kind.REPLY, 0, session.sequence, session.codecs))
            yield from self._converse(session, stream, requests)
        except Refused as refusal:
            context.abort(refusal.code, refusal.line)
        except FedsplitError as error:
            yield from chunks(Packet(Kind.ERROR, payload=one_line(error)))
        except grpc.RpcError:
            pass  # the peer is gone
        finally:
            self._leave(stream)

    def _enter(self, stream: Stream) -> None:
        with self._lock:
            waiting = sum(other.session is None for other in self._streams)
            if waiting >= SPARE:
                raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "Too many streams are being opened, try again.")
            self._streams.add(stream)
        if not stream.context.add_callback(lambda: self._leave(stream)):
            self._leave(stream)

    def _leave(self, stream: Stream) -> None:
        stream.ended.set()
        with self._lock:
            self._streams.discard(stream)
            if stream.session is not None and stream.session.detach(stream):
                self._on_event(stream.session.event("lost"))

    def _admit(self, stream: Stream, packet: Packet, challenge: bytes) -> Session:
        """The session that the OPEN packet has a right to; the stream carries it from now on."""
        if packet.kind is not Kind.OPEN or packet.sequence:
            raise FedsplitError("A stream begins with OPEN.")
        with self._lock:
            session = self._sessions.get(place(packet.payload[:TOKEN_BYTES]))
        # The signature is checked without the lock: it takes a while.
        if session is None or not proves(packet.payload, session.ticket, challenge, time.monotonic()):
            raise Refused(grpc.StatusCode.UNAUTHENTICATED, NO_ENTRY)
        if packet.codecs != session.codecs:
            raise FedsplitError("Device and server have different codecs: give both the same wire settings.")
        with self._lock:
            held = sum(other.state in (State.OPEN, State.AWAY) for other in self._sessions.values())
            if session.state is State.EXPECTED and held >= self._limits.sessions:
                line = f"The server has all of its {self._limits.sessions} sessions open, try again later."
                raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, line)
            if session.state is State.GONE:
                raise Refused(grpc.StatusCode.UNAUTHENTICATED, NO_ENTRY)
            new = session.state is State.EXPECTED
            before = session.attach(stream, time.monotonic())
            stream.session = session
            self._on_event(session.event("opened" if new else "resumed"))
        if isinstance(before, Stream):
            before.context.cancel()
        return session

    def _converse(self, session: Session, stream: Stream, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Packets in, replies out, one at a time, until the peer or the session ends."""
        assembler, pace = Assembler(self._limits.packet_bytes), Pace(self._limits.chunk_bytes)
        for chunk in requests:
            now_s = time.monotonic()
            packet = assembler.add(chunk)
            with self._lock:
                session.progress(len(chunk), 0, now_s)
                wait_s = session.toll(len(chunk), packet is not None, now_s)
            del chunk
            if wait_s and stream.ended.wait(wait_s):
                return
            if packet is None:
                continue
            with self._lock:
                pending, new = session.receive(packet, time.monotonic())
            del packet
            if new:
                self._compute.put(lambda pending=pending: self._handle(session, pending))  # type: ignore[misc]
            while not pending.wait(0.5):
                if stream.ended.is_set():
                    return
            reply, begun_s = pending.reply, time.monotonic()
            assert reply is not None
            for part in chunks(reply, pace.chunk_bytes):
                yield part
                with self._lock:
                    session.progress(0, len(part), time.monotonic())
            pace.sent(len(reply.payload), time.monotonic() - begun_s)
            if reply.kind is Kind.ERROR or session.is_done:
                return

    # In the compute thread

    def _handle(self, session: Session, pending: Pending) -> None:
        packet, begun_s = pending.packet, time.monotonic()
        if packet is None:
            return  # the session has gone meanwhile
        try:
            if session.handler is None:
                session.handler = session.make()
            value, payload = 0, b""
            if packet.kind is not Kind.DONE:
                value, payload = session.handler.handle(packet.kind, packet.value, packet.payload)
            reply = Packet(Kind.REPLY, packet.sequence, value, session.codecs, payload)
            if not 0 <= value < 1 << 64 or len(payload) > self._limits.packet_bytes:
                raise ValueError(f"a reply of {len(payload)} bytes, value {value}, does not fit a packet")
        except Exception as error:
            line = str(error) if isinstance(error, FedsplitError) else "internal error"
            log.log(
                logging.WARNING if isinstance(error, FedsplitError) else logging.ERROR,
                "Session of client %d, round %d: packet %d failed: %s",
                session.ticket.client, session.ticket.round, packet.sequence, error,
                exc_info=not isinstance(error, FedsplitError),
            )  # fmt: skip
            with self._lock:
                pending.answer(session.error(line))
                self._end(session, line)
            return
        with self._lock:
            now_s = time.monotonic()
            if session.answered(pending, reply, now_s - begun_s, now_s) and session.is_done:
                self._on_event(session.event("done"))

    def _close(self, session: Session) -> None:
        with self._lock:
            handler, session.handler = session.handler, None
        if handler is not None:
            handler.close()

    # Ends

    def _end(self, session: Session, reason: str) -> None:
        """The session is gone (the lock is held); a stream that has an error to tell ends by itself."""
        told = session.last is not None and session.last.reply is not None and session.last.reply.kind is Kind.ERROR
        stream = session.end(reason)
        if self._sessions.pop(place(session.ticket.token), None) is not None:
            self._on_event(session.event("dismissed", reason))
            self._past.append(session.figures(time.monotonic()))
            self._reasons[place(session.ticket.token)] = session.last_error or "It is over."
        if isinstance(stream, Stream) and not told:
            stream.context.cancel()
        self._compute.put(lambda: self._close(session))

    def _watch(self) -> None:
        """Dismisses who is silent or too long; ends streams that show no token."""
        while not self._stopped.wait(min(1.0, self._limits.idle_s / 4)):
            now_s = time.monotonic()
            with self._lock:
                for session in list(self._sessions.values()):
                    if reason := session.overdue(now_s):
                        log.info("Client %d, round %d: %s", session.ticket.client, session.ticket.round, reason)
                        self._end(session, reason)
                late = [one for one in self._streams if one.session is None and now_s > one.until_s]
            for stream in late:
                stream.context.cancel()
