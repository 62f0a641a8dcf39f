"""What the server knows of one gRPC stream, and the small steps of its beginning and end."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from typing import Any

from fedsplit.runtime.stream.packet import Assembler, Packet
from fedsplit.runtime.stream.session import Session
from fedsplit.runtime.stream.ticket import PROOF_BYTES
from fedsplit.types import FedsplitError


class Refused(Exception):
    """A stream is to end with a status."""

    def __init__(self, code: Any, line: str) -> None:
        super().__init__(line)
        self.code, self.line = code, line


class Stream:
    """One gRPC stream: its context, whether it has ended, and until when it may go without a session."""

    def __init__(self, context: Any, until_s: float) -> None:
        self.context, self.until_s = context, until_s
        self.ended = threading.Event()
        self.session: Session | None = None


def place(token: bytes) -> bytes:
    """Where a token's session is kept: a hash, so that how long it takes to find says nothing of the token."""
    return hashlib.sha256(token).digest()


def first(requests: Iterator[bytes]) -> Packet:
    """The first packet of a stream: no longer than an OPEN."""
    assembler = Assembler(PROOF_BYTES)
    for chunk in requests:
        if packet := assembler.add(chunk):
            return packet
    raise FedsplitError("The stream ended before it began.")


def one_line(error: FedsplitError) -> bytes:
    """The message for an ERROR packet."""
    return " ".join(str(error).split())[:300].encode()
