"""One end of a client's wire: codecs, bytes, the ledger and the tap.

Codecs never meet autograd: a tensor is detached, encoded, turned into bytes, and decoded at the
other end. The ledger counts the length of what was serialised, never what a codec claims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedsplit.rng import key
from fedsplit.types import STREAMS, FedsplitError, Stream, Tensors
from fedsplit.wire.codec import MOST_VALUES, PARAMETERS, WHOLE, Codec, Codecs, Context, Shapes, Squeeze, Tap, squeezes
from fedsplit.wire.frame import frame_length, pack, unpack
from fedsplit.wire.parts import finite

__all__ = ["Codec", "Codecs", "Context", "Link", "Tap"]

CODED = "x"
"""On the activation and gradient streams codecs see this tensor alone: orders and scores arrive as they are."""
KEPT = "wire|"
"""Begins the names of what codecs remember from round to round."""
SPARE_BYTES = 65536


@dataclass
class Link:
    """One end of the wire between one client and the server.

    `sizes` (bytes) and `messages` count both directions as this end saw them, `raw` what the bytes were without
    codecs; `memory` is kept by (stream, tensor, stage). A `tap` sees what this end received, after decoding: at
    the server's end it is a transcript. `seed` begins the streams of random draws.
    """

    codecs: Codecs
    round: int = 0
    client: int = 0
    tap: Tap | None = None
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STREAMS, 0))
    messages: int = 0
    memory: dict[tuple[str, str, int], Any] = field(default_factory=dict)
    raw: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STREAMS, 0))
    seed: int = 0
    most: int = MOST_VALUES

    def encode(self, stream: Stream, tensors: Tensors) -> bytes:
        """The frame of `tensors` after the codecs of `stream`.

        Raises:
            FedsplitError: a tensor that codecs should see is not finite, or not float32.
        """
        stages, last = self._chain(stream)
        coded: Tensors = {}
        for name, tensor in tensors.items():
            x = tensor.detach()
            if stages and _is_coded(stream, name) and x.is_floating_point():
                coded |= self._encode(stream, name, _sound(x, stream, name), stages)
            else:
                coded[name] = x
        frame = pack(coded)
        sent = last.pack(frame) if last and frame else frame
        self._count(stream, len(sent), frame_length(tensors) if stages else len(frame))
        return sent

    def decode(self, stream: Stream, frame: bytes, shapes: Shapes | None = None) -> Tensors:
        """The tensors of `frame` as this end sees them.

        Args:
            stream: the stream that the frame came on.
            frame: what arrived.
            shapes: of the tensors that may come, by name, where the receiver knows them.

        Raises:
            FedsplitError: the bytes are no frame of this stream's codecs, or not what `shapes` say.
        """
        stages, last = self._chain(stream)
        self.sizes[stream] += len(frame)
        self.messages += 1
        frame = last.unpack(frame, self._most_bytes(shapes)) if last and frame else frame
        plain, sides = _sorted(unpack(frame), stages)
        tensors: Tensors = {}
        for name, x in plain.items():
            side = sides.pop(name, {})
            if stages and _is_coded(stream, name) and x.dtype is not torch.int64:
                x = self._decode(stream, name, x, side, shapes)
                side = {}
            if side or (stream not in PARAMETERS and name == CODED and _odd(x, (shapes or {}).get(name))):
                raise FedsplitError(f"Received '{name}' ({stream}) as {_form(x)}, which is not what was asked for.")
            tensors[name] = x
        if sides:
            raise FedsplitError(f"Received parts of '{next(iter(sides))}' ({stream}) without the tensor itself.")
        self.raw[stream] += frame_length(tensors) if stages else len(frame)
        if self.tap is not None:
            self.tap(stream, tensors)
        return tensors

    def hold(self, stream: Stream, tensors: Mapping[str, Tensor]) -> None:
        """Tell the codecs of a parameter stream the values that this end has."""
        stages: Sequence[Any] = self._chain(stream)[0]
        for number, stage in enumerate(stages):
            for name, value in tensors.items() if hasattr(stage, "hold") else ():
                slot = (stream, name, number)
                x, context = value.detach().cpu(), self._context(stream, name, number)
                self.memory[slot] = stage.hold(x, self.memory.get(slot), context)

    def kept(self) -> Tensors:
        """What the codecs of the parameter streams remember for the next round."""
        return {
            f"{KEPT}{stream}|{name}|{stage}|{part}": value
            for (stream, name, stage), memory in self.memory.items()
            if stream in PARAMETERS and memory
            for part, value in memory.items()
        }

    def recall(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back in what `kept` gave, wherever it stands among `tensors`."""
        for slot, value in tensors.items():
            if slot.startswith(KEPT):
                stream, name, stage, part = slot.removeprefix(KEPT).split("|")
                self.memory.setdefault((stream, name, int(stage)), {})[part] = value

    def _chain(self, stream: Stream) -> tuple[Sequence[Codec], Squeeze | None]:
        stages = self.codecs.get(stream, ())
        return (stages[:-1], stages[-1]) if stages and squeezes(stages[-1]) else (stages, None)

    def _context(self, stream: Stream, name: str, stage: int, most: int | None = None) -> Context:
        draws = key(self.seed, stream, self.round, self.client, self.messages, name, stage)
        return Context(stream, name, self.round, self.client, draws, self.most if most is None else most)

    def _encode(self, stream: Stream, name: str, x: Tensor, stages: Sequence[Any]) -> Tensors:
        coded: Tensors = {}
        trail: list[tuple[Any, Tensors]] = []
        for number, codec in enumerate(stages):
            slot = (stream, name, number)
            before = self.memory.get(slot)
            x, side, self.memory[slot] = codec.encode(x, before, self._context(stream, name, number))
            trail.append((before, side))
            coded |= {f"{name}|{number}|{part}": value for part, value in side.items()}
            if WHOLE in side:
                break
        coded[name] = x
        if any(hasattr(codec, "echo") and stream in getattr(codec, "echoed", STREAMS) for codec in stages):
            for number, (before, side) in reversed(list(enumerate(trail))):
                slot, codec, context = (stream, name, number), stages[number], self._context(stream, name, number)
                if hasattr(codec, "echo"):
                    self.memory[slot] = codec.echo(x, self.memory.get(slot), context)
                x, _ = codec.decode(x, dict(side), before, context)
        return coded

    def _decode(self, stream: Stream, name: str, x: Tensor, side: dict[int, Tensors], shapes: Shapes | None) -> Tensor:
        stages, _ = self._chain(stream)
        if shapes is not None and name not in shapes:
            raise FedsplitError(f"It names a tensor '{name}' that was not asked for.")
        most = self.most if shapes is None else _count(shapes[name])
        first = min((number for number, parts in side.items() if WHOLE in parts), default=len(stages) - 1)
        try:
            for number in range(first, -1, -1):
                slot, parts = (stream, name, number), side.pop(number, {})
                context = self._context(stream, name, number, most)
                x, self.memory[slot] = stages[number].decode(x, parts, self.memory.get(slot), context)
                parts.pop(WHOLE, None)
                if parts:
                    raise FedsplitError(f"it has a part '{next(iter(parts))}' that nobody sends")
            if side:
                raise FedsplitError("it has parts of a stage that was left out")
            if _odd(x, None if shapes is None else shapes[name]):
                raise FedsplitError(f"it is {_form(x)}")
        except (FedsplitError, RuntimeError, ValueError, TypeError, IndexError, OverflowError) as error:
            raise FedsplitError(f"Received '{name}' ({stream}) that cannot be decoded: {error}.") from None
        return x

    def _most_bytes(self, shapes: Shapes | None) -> int:
        """The longest frame that may come out of a last stage: twice the plain one."""
        values = self.most if shapes is None else sum(_count(shape) for shape in shapes.values())
        return 8 * values + SPARE_BYTES + 1024 * len(shapes or ())

    def _count(self, stream: Stream, sent: int, raw: int) -> None:
        self.sizes[stream] += sent
        self.raw[stream] += raw
        self.messages += 1


def _is_coded(stream: Stream, name: str) -> bool:
    return stream in PARAMETERS or name == CODED


def _sound(x: Tensor, stream: Stream, name: str) -> Tensor:
    """`x` on the CPU, where every device makes the same bytes of it."""
    if x.dtype is not torch.float32:
        raise FedsplitError(f"'{name}' ({stream}) is {x.dtype}, and codecs take float32; leave wire.{stream} empty.")
    x = x.cpu()
    if not finite(x):
        raise FedsplitError(
            f"'{name}' ({stream}) holds values that are not finite, which no codec can send; lower optimizer.lr."
        )
    return x


def _sorted(coded: Tensors, stages: Sequence[Any]) -> tuple[Tensors, dict[str, dict[int, Tensors]]]:
    """The tensors of a frame, and apart from them the side tensors, by tensor and stage."""
    plain: Tensors = {}
    sides: dict[str, dict[int, Tensors]] = {}
    for slot, value in coded.items():
        name, *rest = slot.split("|")
        if not rest:
            plain[name] = value
        elif len(rest) == 2 and rest[0] in map(str, range(len(stages))):
            sides.setdefault(name, {}).setdefault(int(rest[0]), {})[rest[1]] = value
        else:
            raise FedsplitError(f"Received a tensor '{slot[:80]}' that nobody sends.")
    return plain, sides


def _odd(x: Tensor, shape: Sequence[int] | None) -> bool:
    return not x.is_floating_point() or (shape is not None and tuple(x.shape) != tuple(shape))


def _form(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
