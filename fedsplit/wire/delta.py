"""The difference from a value that both ends have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsplit.types import FedsplitError, Stream, Tensors
from fedsplit.wire.codec import WHOLE
from fedsplit.wire.link import Context

REFERENCE = "reference"


@dataclass(frozen=True)
class Delta:
    """Sends the difference from a shared reference; the receiver adds its own copy.

    Up, the reference is the model that the round began with: at the client as it arrived, at the server as it is.
    Down, it is what this client decoded the last time, which both ends keep (the server's copy is in its notes on the
    client): what a lossy stage behind loses is then still in the next difference. Without a reference the tensor goes
    whole, past the stages behind.

    Paper: none; the upload of arXiv 2412.19989 (Caesar), steps 4 to 6, and the delta variant of its download.
    Place: wire, parameters; first.
    Off: not named. Alone it saves nothing and is right to the last bit or so of the reference: in floats
        (x - r) + r need not be x.
    Deviates: activations and their gradients are refused, since no two messages are about the same samples.
    """

    echoed: ClassVar[tuple[Stream, ...]] = ("parameters-down",)

    def encode(self, x: Tensor, memory: Any, context: Context) -> tuple[Tensor, Tensors, Any]:
        """The difference, or `x` whole."""
        if memory is None:
            return x, {WHOLE: torch.empty(0, dtype=torch.uint8)}, None
        return x - memory[REFERENCE], {}, memory if context.stream in self.echoed else None

    def echo(self, received: Tensor, memory: Any, context: Context) -> Any:
        """The reference of the next time, as the receiver makes it."""
        return self._after(received if memory is None else memory[REFERENCE] + received, context)

    def decode(self, x: Tensor, side: Tensors, memory: Any, context: Context) -> tuple[Tensor, Any]:
        """The reference and `x`."""
        if side.pop(WHOLE, None) is not None:
            return x, self._after(x, context)
        if memory is None or memory[REFERENCE].shape != x.shape:
            raise FedsplitError(f"a difference {tuple(x.shape)} came, and this end has nothing that it could be from")
        value = memory[REFERENCE] + x
        return value, self._after(value, context)

    def hold(self, x: Tensor, memory: Any, context: Context) -> Any:
        """Up, the reference: what the round began with."""
        return {REFERENCE: x} if context.stream == "parameters-up" else memory

    def _after(self, value: Tensor, context: Context) -> Any:
        return {REFERENCE: value} if context.stream == "parameters-down" else None
