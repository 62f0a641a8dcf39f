"""What a peer may take of this end, and the arithmetic of rates."""

from __future__ import annotations

from dataclasses import dataclass

from fedsplit.runtime.stream.packet import LEAST_CHUNK_BYTES, MOST_CHUNK_BYTES
from fedsplit.types import FedsplitError

LEAST_BYTES_PER_S = 16 * 1024
"""A peer in the middle of a packet is silent for as long as it is behind this rate."""
CHUNK_S = 1.0
FIRST_CHUNK_BYTES = 1 << 20
OPENING_S = 10.0
"""How long a stream may take to show its token."""


@dataclass(frozen=True)
class Limits:
    """Limits of one end of the stream.

    `sessions` may be open at once; a packet may hold `packet_bytes`; at most `chunk_bytes` go into a gRPC message. A
    peer whose packet does not come for `idle_s`, or whose session lasts longer than `session_s`, is dismissed. Rates
    are of a session's way up; above them it waits, 0 is no limit.
    """

    sessions: int = 64
    packet_bytes: int = 256 << 20
    chunk_bytes: int = MOST_CHUNK_BYTES
    idle_s: float = 60.0
    session_s: float = 3600.0
    bytes_per_s: float = 0.0
    packets_per_s: float = 0.0

    def __post_init__(self) -> None:
        if not 1024 <= self.chunk_bytes <= MOST_CHUNK_BYTES:
            raise FedsplitError(f"chunk_bytes={self.chunk_bytes} must be between 1024 and {MOST_CHUNK_BYTES}.")
        for name in ("sessions", "packet_bytes", "idle_s", "session_s"):
            if not getattr(self, name) > 0:
                raise FedsplitError(f"The stream's limit {name}={getattr(self, name)} must be more than 0.")
        if not (self.bytes_per_s >= 0 and self.packets_per_s >= 0):
            raise FedsplitError("The stream's rates must be 0 (no limit) or more.")


class Bucket:
    """A token bucket that lends: what is taken is always given, and then waited for."""

    def __init__(self, per_s: float, burst: float, now_s: float) -> None:
        self._per_s, self._burst = per_s, burst
        self._level, self._at_s = burst, now_s

    def take(self, amount: float, now_s: float) -> float:
        """Seconds to wait after taking `amount` at `now_s`; 0 without a rate."""
        if not self._per_s:
            return 0.0
        self._level = min(self._burst, self._level + (now_s - self._at_s) * self._per_s) - amount
        self._at_s = now_s
        return max(0.0, -self._level / self._per_s)


class Pace:
    """How much goes into one gRPC message: what the network carries in a second, so that both ends see it move.

    Whole payloads in one message are fastest, but a part of a message does not show at the other end.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self.chunk_bytes = min(most_bytes, FIRST_CHUNK_BYTES)

    def sent(self, size: int, seconds: float) -> None:
        """A packet of `size` bytes took so long to send; short ones say nothing."""
        if size > LEAST_CHUNK_BYTES:
            self.chunk_bytes = int(min(self._most, max(LEAST_CHUNK_BYTES, CHUNK_S * size / max(seconds, 1e-6))))
