"""One bit a value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsplit.types import Tensors, knob
from fedsplit.wire.link import Context
from fedsplit.wire.parts import pack_bits, rows, shape_part, take, take_shape, unpack_bits


@dataclass(frozen=True)
class Sign:
    """The signs as packed bits, and the mean of |x|: each value arrives as plus or minus that mean.

    Paper: arXiv 1901.09847 (scaled sign, section 4), which asks for error feedback with it.
    Place: wire, any stream; on parameters after delta.
    Off: not named.
    Deviates: the sign of 0 is plus.
    """

    scope: str = knob("tensor", "what shares a mean: the 'tensor', or each 'row'", choices=("tensor", "row"))

    def encode(self, x: Tensor, memory: Any, context: Context) -> tuple[Tensor, Tensors, Any]:
        """Packed signs (bytes,) uint8, with side tensors `mean` (rows,) and `shape`; whole numbers pass."""
        if not x.is_floating_point():
            return x, {}, memory
        values = self._rows(x.to(torch.float32))
        mean = values.abs().double().mean(-1).float() if values.numel() else values.new_zeros(len(values))
        return pack_bits(x >= 0), {"mean": mean} | shape_part(x), memory

    def decode(self, x: Tensor, side: Tensors, memory: Any, context: Context) -> tuple[Tensor, Any]:
        """`x` in float32."""
        if not side and not x.is_floating_point():
            return x, memory
        shape = take_shape(side, context.most)
        signs = self._rows(unpack_bits(x, math.prod(shape)).reshape(shape))
        mean = take(side, "mean", torch.float32, (len(signs),)).unsqueeze(-1)
        return torch.where(signs, mean, -mean).reshape(shape), memory

    def _rows(self, x: Tensor) -> Tensor:
        return rows(x) if self.scope == "row" else x.reshape(1, -1)
