"""A device's end of the stream: one exchange at a time, over as many connections as it takes."""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsplit.runtime.stream.channel import METHOD, SERVICE, connect
from fedsplit.runtime.stream.limits import Limits, Pace
from fedsplit.runtime.stream.packet import Assembler, Kind, Packet, chunks
from fedsplit.runtime.stream.ticket import prove
from fedsplit.types import FedsplitError

__all__ = ["Limits", "StreamClient"]

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 5.0
LOST = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)
"""What a connection ends with that may be tried again."""
CERTIFICATE = ("CERTIFICATE_VERIFY_FAILED", "BAD_SIGNATURE", "certificate signature", "Hostname Verification")


class _Lost(Exception):
    """The connection is gone, or was not to be had."""


class StreamClient:
    """A session with the server's body, from one thread.

    Args:
        address: host and port of the server.
        token: what the round's message carried.
        key: this node's own, whose public half the server knows.
        root_certificates: PEM of who signed the server's certificate; None trusts the system's authorities,
            "plaintext" does without TLS.
        codecs: `fingerprint` of the codecs of both directions.
        limits: of packets, and of the session's length.
        patience_s: seconds without a connection after which an exchange gives up.
        name_override: the name in the server's certificate, where it is not the address's.
    """

    def __init__(
        self,
        address: str,
        token: bytes,
        key: Ed25519PrivateKey,
        *,
        root_certificates: bytes | Literal["plaintext"] | None,
        codecs: int,
        limits: Limits,
        patience_s: float = 60.0,
        name_override: str = "",
    ) -> None:
        self._address, self._token, self._key = address, token, key
        self._roots, self._name = root_certificates, name_override
        self._codecs, self._limits, self._patience_s = codecs, limits, patience_s
        self._sequence = 0
        self._stream: _Stream | None = None
        self._failed = ""

    def exchange(self, kind: Kind, value: int, payload: bytes) -> tuple[int, bytes]:
        """Send a packet; value and payload of its reply. A lost connection is made anew and the packet sent again.

        Raises:
            FedsplitError: the server refused or reported an error, or patience has ended. The session is then over.
        """
        if self._failed:
            raise FedsplitError(self._failed)
        self._sequence += 1
        try:
            reply = self._deliver(Packet(kind, self._sequence, value, self._codecs, payload))
        except FedsplitError as error:
            self._failed = str(error)
            self.close()
            raise
        return reply.value, reply.payload

    def done(self) -> None:
        """Say DONE and wait until the server has acknowledged it.

        Raises:
            FedsplitError: as for `exchange`.
        """
        self.exchange(Kind.DONE, 0, b"")
        self._failed = "This session is done."
        self.close()

    def close(self) -> None:
        """Leave. Without `done` before it the server forgets the session."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def _deliver(self, packet: Packet) -> Packet:
        """The reply to `packet`, over as many connections as it takes."""
        patience_s, pause_s, why = self._patience_s, FIRST_PAUSE_S, ""
        while True:
            begun_s = time.monotonic()
            try:
                if self._stream is None:
                    self._stream = self._open(max(patience_s, FIRST_PAUSE_S))
                    patience_s -= time.monotonic() - begun_s
                return self._stream.exchange(packet)
            except _Lost as lost:
                if self._stream is None:
                    patience_s -= time.monotonic() - begun_s
                why = str(lost)
                self.close()
            pause = pause_s * (0.5 + secrets.randbelow(1024) / 1024)
            if pause > patience_s:
                raise FedsplitError(
                    f"No connection to {self._address} within {self._patience_s:g} s ({why}): "
                    "check the address, the network and that the server runs."
                )
            time.sleep(pause)
            patience_s -= pause
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _open(self, within_s: float) -> _Stream:
        """A new connection, authorised for the session."""
        stream = _Stream(connect(self._address, self._roots, self._name), self._address, self._limits)
        late = threading.Timer(within_s, stream.close)
        late.daemon = True
        late.start()
        try:
            hello = stream.read(Kind.HELLO)
            proof = prove(self._token, self._key, hello.payload)
            stream.exchange(Packet(Kind.OPEN, 0, 0, self._codecs, proof))
        except BaseException:
            stream.close()
            raise
        finally:
            late.cancel()
        return stream


class _Stream:
    """One gRPC stream over a channel of its own."""

    def __init__(self, channel: Any, address: str, limits: Limits) -> None:
        self._channel, self._address = channel, address
        self._pace = Pace(limits.chunk_bytes)
        self._assembler = Assembler(limits.packet_bytes)
        self._packets: queue.SimpleQueue[Packet | None] = queue.SimpleQueue()
        self._replies = channel.stream_stream(f"/{SERVICE}/{METHOD}")(self._requests(), timeout=limits.session_s)

    def _requests(self) -> Iterator[bytes]:
        while (packet := self._packets.get()) is not None:
            begun_s = time.monotonic()
            yield from chunks(packet, self._pace.chunk_bytes)
            self._pace.sent(len(packet.payload), time.monotonic() - begun_s)
            del packet

    def exchange(self, packet: Packet) -> Packet:
        """Send `packet` and read the reply with its number."""
        self._packets.put(packet)
        reply = self.read(Kind.REPLY)
        if reply.sequence != packet.sequence:
            raise FedsplitError(f"The server answered packet {reply.sequence} instead of {packet.sequence}.")
        if reply.codecs != packet.codecs:
            raise FedsplitError("Device and server have different codecs: give both the same wire settings.")
        return reply

    def read(self, kind: Kind) -> Packet:
        """The next packet, which must be of this kind."""
        packet = None
        try:
            while packet is None:
                packet = self._assembler.add(next(self._replies))
        except StopIteration:
            raise _Lost("the server ended the stream") from None
        except grpc.RpcError as error:
            raise self._reason(error) from None
        if packet.kind is Kind.ERROR:
            raise FedsplitError(packet.payload.decode(errors="replace")[:300])
        if packet.kind is not kind:
            raise FedsplitError(f"The server sent {packet.kind.name} where {kind.name} was due.")
        return packet

    def _reason(self, error: Any) -> Exception:
        """A refusal as `FedsplitError`, anything else as a lost connection."""
        code, details = error.code(), " ".join(str(error.details()).split())
        if code is grpc.StatusCode.UNAVAILABLE and "WRONG_VERSION_NUMBER" in details:
            return FedsplitError(f"{self._address} does not speak TLS: give its server a certificate.")
        if code is grpc.StatusCode.UNAVAILABLE and any(word in details for word in CERTIFICATE):
            return FedsplitError(
                f"The certificate of {self._address} is not trusted: "
                "check the root certificate, this clock, and that the address is a name in the server's certificate."
            )
        if code in LOST:
            return _Lost(details)
        if code is grpc.StatusCode.UNAUTHENTICATED:
            return FedsplitError(f"{self._address} refused the session: {details}")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return FedsplitError("The session took longer than its limit.")
        return FedsplitError(f"{self._address} is no server of fedsplit, or an older one ({code.name}: {details}).")

    def close(self) -> None:
        """End the stream; from any thread."""
        self._packets.put(None)
        self._replies.cancel()
        self._channel.close()
