"""One end of a client's wire: codecs, bytes, the ledger and the tap.

Codecs never meet autograd: a tensor is detached, encoded, turned into bytes, and decoded at the
other end. The ledger counts the length of what was serialised, never what a codec claims.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from fedsplit.types import STREAMS, Stream, Tensors
from fedsplit.wire.frame import pack, unpack


@dataclass(frozen=True)
class Context:
    """What a codec may know of the tensor at hand besides its values."""

    stream: Stream
    tensor: str
    round: int
    client: int


class Codec(Protocol):
    """A stage between a tensor and its bytes; stages chain, and decode in reverse.

    `encode` returns the smaller tensor, side tensors that travel with it, and its memory (error
    feedback, a stale copy; None at first); `decode` takes them back in.
    """

    def encode(self, x: Tensor, memory: Any, context: Context) -> tuple[Tensor, Tensors, Any]:
        """The coded tensor, its side tensors, and the memory for the next call."""

    def decode(self, x: Tensor, side: Tensors, memory: Any, context: Context) -> tuple[Tensor, Any]:
        """The tensor as the receiver sees it, and the memory for the next call."""


Tap = Callable[[Stream, Tensors], None]
Codecs = Mapping[Stream, Sequence[Codec]]


@dataclass
class Link:
    """One end of the wire between one client and the server.

    `sizes` (bytes) and `messages` count both directions as this end saw them; `memory` is kept by
    (stream, tensor, stage). A `tap` sees what this end received, after decoding: at the server's end
    it is a transcript.
    """

    codecs: Codecs
    round: int = 0
    client: int = 0
    tap: Tap | None = None
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STREAMS, 0))
    messages: int = 0
    memory: dict[tuple[str, str, int], Any] = field(default_factory=dict)

    def encode(self, stream: Stream, tensors: Tensors) -> bytes:
        """The frame of `tensors` after the codecs of `stream`."""
        coded: Tensors = {}
        for name, tensor in tensors.items():
            x = tensor.detach()
            context = Context(stream, name, self.round, self.client)
            for stage, codec in enumerate(self.codecs.get(stream, ())):
                slot = (stream, name, stage)
                x, side, self.memory[slot] = codec.encode(x, self.memory.get(slot), context)
                coded |= {_side(name, stage, key): value for key, value in side.items()}
            coded[name] = x
        frame = pack(coded)
        self._count(stream, frame)
        return frame

    def decode(self, stream: Stream, frame: bytes) -> Tensors:
        """The tensors of `frame` as this end sees them."""
        self._count(stream, frame)
        coded = unpack(frame)
        tensors: Tensors = {}
        for name in [name for name in coded if "|" not in name]:
            x = coded[name]
            context = Context(stream, name, self.round, self.client)
            for stage, codec in reversed(list(enumerate(self.codecs.get(stream, ())))):
                slot = (stream, name, stage)
                prefix = _side(name, stage, "")
                side = {key.removeprefix(prefix): value for key, value in coded.items() if key.startswith(prefix)}
                x, self.memory[slot] = codec.decode(x, side, self.memory.get(slot), context)
            tensors[name] = x
        if self.tap is not None:
            self.tap(stream, tensors)
        return tensors

    def _count(self, stream: Stream, frame: bytes) -> None:
        self.sizes[stream] += len(frame)
        self.messages += 1


def _side(name: str, stage: int, key: str) -> str:
    return f"{name}|{stage}|{key}"
