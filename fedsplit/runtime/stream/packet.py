"""Packets between a device and the server's body: a checked header and raw bytes. No pickle, no protobuf.

`docs/link.md` has the table of the header. A long payload's check is a CRC-32 of the 64-bit sums of its blocks:
a CRC-32 of every byte would cost as much as the transport itself.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from io import BytesIO

import numpy as np

from fedsplit.types import FedsplitError

MAGIC = b"FSPK"
VERSION = 1
HEADER = struct.Struct("<4sBBHQQQI")
HEADER_BYTES = HEADER.size + 4
"""The fields and the CRC-32 behind them."""
BLOCK_BYTES = 4096
PLAIN_BYTES = 16 << 10
"""Longer payloads are checked by the sums of their blocks."""
JOIN_BYTES = 512 << 10
"""Up to this length a packet is one message. In a longer one the header goes alone, and the payload is not copied."""
LEAST_CHUNK_BYTES = 64 << 10
MOST_CHUNK_BYTES = 16 << 20
"""The longest gRPC message that either end takes."""


class Kind(IntEnum):
    """What a packet is. HELLO, REPLY and ERROR come from the server, the others from a device."""

    HELLO = 1
    OPEN = 2
    FORWARD = 3
    BACKWARD = 4
    LEARN = 5
    DONE = 6
    REPLY = 7
    ERROR = 8


_KINDS = {int(kind): kind for kind in Kind}


@dataclass(frozen=True)
class Packet:
    """One packet. `value` (64 bits, unsigned) is a random stream on the way up, the bits of a loss on the way down.

    `sequence` numbers a session's packets from 1, `codecs` is the `fingerprint` of the codecs of the sender. `check`
    is what the header of a received packet said.
    """

    kind: Kind
    sequence: int = 0
    value: int = 0
    codecs: int = 0
    payload: bytes = b""
    check: int = field(default=0, compare=False)


def fingerprint(text: str) -> int:
    """CRC-32 of a text that names the codecs of both directions: it must be the same at both ends."""
    return zlib.crc32(text.encode())


def chunks(packet: Packet, chunk_bytes: int = MOST_CHUNK_BYTES) -> Iterator[bytes]:
    """The packet as gRPC messages of at most `chunk_bytes` bytes; the first one begins with the header."""
    payload = packet.payload
    size = len(payload)
    fields = HEADER.pack(MAGIC, VERSION, packet.kind, 0, packet.sequence, packet.value, size, packet.codecs)
    header = fields + _check(fields, payload).to_bytes(4, "little")
    if HEADER_BYTES + size <= min(chunk_bytes, JOIN_BYTES):
        yield header + payload
        return
    yield header
    if size <= chunk_bytes:
        yield payload
        return
    for at in range(0, size, chunk_bytes):
        yield payload[at : at + chunk_bytes]


class Assembler:
    """Puts the messages of one direction of a stream together again, and trusts none of them.

    It keeps what has arrived of one packet, never more than the declared length, and refuses a declared length
    above `most_bytes` before it keeps anything. After an error it is of no more use.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._header: tuple[int, int, int, int] | None = None
        self._fields = b""
        self._check = self._length = self._left = 0
        self._parts: BytesIO | None = None

    @property
    def waiting(self) -> bool:
        """Whether a packet has begun and is not whole."""
        return self._header is not None

    def add(self, chunk: bytes) -> Packet | None:
        """The packet that `chunk` completes, if it does.

        Raises:
            FedsplitError: the bytes are no packet, are damaged, or are more than was declared or is allowed.
        """
        part: bytes | memoryview = chunk
        if self._header is None:
            self._begin(chunk)
            part = memoryview(chunk)[HEADER_BYTES:]
        elif not chunk:
            raise FedsplitError("Received an empty message within a packet.")
        if len(part) > self._left:
            raise FedsplitError(f"Received a packet with {len(part) - self._left} bytes more than it declares.")
        self._left -= len(part)
        if len(part) == self._length:
            return self._whole(bytes(part))  # no copy of a message that is all of the payload
        if self._parts is None:
            self._parts = BytesIO()
        self._parts.write(part)
        return self._whole(self._parts.getvalue()) if not self._left else None

    def end(self) -> None:
        """Say that nothing follows.

        Raises:
            FedsplitError: a packet is not whole.
        """
        if self.waiting:
            raise FedsplitError(f"Received a packet that was cut short: {self._left} bytes are missing.")

    def _begin(self, chunk: bytes) -> None:
        if len(chunk) < HEADER_BYTES:
            raise FedsplitError(f"Received {len(chunk)} bytes where a packet begins, less than a header.")
        magic, version, kind, zero, sequence, value, length, codecs = HEADER.unpack_from(chunk)
        if magic != MAGIC:
            raise FedsplitError("Received bytes that are not a packet of fedsplit.")
        if version != VERSION:
            raise FedsplitError(f"Received a packet of version {version}, this end speaks {VERSION}: update one end.")
        if kind not in _KINDS or zero:
            raise FedsplitError(f"Received a packet of unknown kind {kind}.")
        if length > self._most:
            raise FedsplitError(f"Received a packet of {length} bytes, more than the limit of {self._most}.")
        self._header = (kind, sequence, value, codecs)
        self._fields = chunk[: HEADER.size]
        self._check = int.from_bytes(chunk[HEADER.size : HEADER_BYTES], "little")
        self._length = self._left = length

    def _whole(self, payload: bytes) -> Packet:
        assert self._header is not None
        if _check(self._fields, payload) != self._check:
            raise FedsplitError("Received a damaged packet: its check does not fit its bytes.")
        kind, sequence, value, codecs = self._header
        self._header, self._parts = None, None
        return Packet(_KINDS[kind], sequence, value, codecs, payload, self._check)


def _check(fields: bytes, payload: bytes) -> int:
    """CRC-32 of the fields, then of the payload or, where it is long, of its blocks' sums and the rest."""
    crc = zlib.crc32(fields)
    if len(payload) > PLAIN_BYTES:
        whole = len(payload) // BLOCK_BYTES
        words = np.frombuffer(payload, "<u8", whole * (BLOCK_BYTES // 8))
        sums = np.add.reduce(words.reshape(whole, -1), axis=1, dtype=np.uint64)
        crc = zlib.crc32(sums.astype("<u8", copy=False), crc)
        payload = payload[whole * BLOCK_BYTES :]
    return zlib.crc32(payload, crc)
