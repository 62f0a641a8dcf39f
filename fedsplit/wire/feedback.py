"""Error feedback: what the codecs behind it lose is added the next time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedsplit.types import Tensors
from fedsplit.wire.link import Context

RESIDUAL = "residual"


@dataclass(frozen=True)
class Feedback:
    """Sends x + e, where e is what the receiver has not got so far: all that was put in less all that was decoded.

    Paper: arXiv 1901.09847 (EF-SGD), algorithm 2, without its step size.
    Place: wire, parameters; first, or right after delta. The residual is the sender's memory from round to round:
        the client's in what it writes down, the server's in its notes on the client.
    Off: not named; with nothing lossy behind it the residual is 0.
    Deviates: activations and their gradients are refused, since the next message is about other samples.
    """

    def encode(self, x: Tensor, memory: Any, context: Context) -> tuple[Tensor, Tensors, Any]:
        """`x` and what is owed."""
        owed = x if memory is None or memory[RESIDUAL].shape != x.shape else x + memory[RESIDUAL]
        return owed, {}, {RESIDUAL: owed}

    def echo(self, received: Tensor, memory: Any, context: Context) -> Any:
        """The residual, once it is known what arrives."""
        return {RESIDUAL: memory[RESIDUAL] - received}

    def decode(self, x: Tensor, side: Tensors, memory: Any, context: Context) -> tuple[Tensor, Any]:
        """`x` as it came."""
        return x, memory
