"""What a stage of the wire is: the protocols that codecs follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fedsplit.types import Stream, Tensors

PARAMETERS: tuple[Stream, Stream] = ("parameters-up", "parameters-down")
WHOLE = "whole"
"""A side tensor of this name says that its stage handed `x` on as it is, and that no later stage saw it."""
MOST_VALUES = 2**28
"""Values that a decoder makes at most of one tensor whose shape the receiver cannot know."""


@dataclass(frozen=True)
class Context:
    """What a codec may know of the tensor at hand besides its values.

    `key` is the stream of its random draws, another for every message; a decoder makes `most` values at most.
    """

    stream: Stream
    tensor: str
    round: int
    client: int
    key: int = 0
    most: int = MOST_VALUES


class Codec(Protocol):
    """A stage between a tensor and its bytes; stages chain, and decode in reverse.

    `encode` returns the smaller tensor, side tensors that travel with it, and its memory (error
    feedback, a stale copy; None at first, else tensors by name); `decode` takes them back in, its side tensors
    out of `side`: what is left there is refused. The first stage gets float32 on the CPU, a later one what the
    one before hands on; whole numbers pass.

    A codec may have two more methods, which return its new memory. `echo(received, memory, context)`, after
    every encoding (on the streams `echoed`, if it names some): what the receiver's `decode` of this stage will be
    given. `hold(x, memory, context)`: the
    value of a parameter that this end of the wire has, before it goes up or after what came down was trained.
    """

    def encode(self, x: Tensor, memory: Any, context: Context) -> tuple[Tensor, Tensors, Any]:
        """The coded tensor, its side tensors, and the memory for the next call."""

    def decode(self, x: Tensor, side: Tensors, memory: Any, context: Context) -> tuple[Tensor, Any]:
        """The tensor as the receiver sees it, and the memory for the next call."""


class Squeeze(Protocol):
    """A last stage, which turns a whole frame into fewer bytes."""

    def pack(self, frame: bytes) -> bytes:
        """The bytes that cross the wire."""

    def unpack(self, data: bytes, most_bytes: int) -> bytes:
        """The frame; FedsplitError if it would be longer than `most_bytes`, before it is made."""


Tap = Callable[[Stream, Tensors], None]
Stage = Any  # a Codec, or as the last one a Squeeze
Codecs = Mapping[Stream, Sequence[Stage]]
Shapes = Mapping[str, Sequence[int]]


def squeezes(stage: Stage) -> bool:
    """Whether a stage works on whole frames."""
    return hasattr(stage, "unpack")
