"""Eight bits a value, one scale a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsplit import rng
from fedsplit.types import FedsplitError, Tensors, knob
from fedsplit.wire.link import Context
from fedsplit.wire.parts import rows, take

LEVELS = 127


@dataclass(frozen=True)
class Int8:
    """Each row of the last axis, a token, as whole numbers from -127 to 127 and a float32 scale, its largest |x| / 127.

    Paper: none; symmetric quantisation is common practice. The error is at most half a scale a value, a whole
        one if rounding is stochastic, which makes it right on average.
    Place: wire, any stream; of a parameter a row is that of its last axis, after topk all kept values are one row.
    Off: not named.
    Deviates: no zero point, so that zero stays zero.
    """

    rounding: str = knob(
        "nearest", "'nearest', or 'stochastic': at random, right on average", choices=("nearest", "stochastic")
    )

    def encode(self, x: Tensor, memory: Any, context: Context) -> tuple[Tensor, Tensors, Any]:
        """`x` in int8 and side tensor `scale` (R,); tensors of whole numbers pass."""
        if not x.is_floating_point():
            return x, {}, memory
        values = rows(x.to(torch.float32))
        peak = values.abs().amax(-1) if values.numel() else values.new_zeros(len(values))
        scale = peak / LEVELS
        steps = values / scale.where(scale > 0, torch.ones(())).unsqueeze(-1)
        if self.rounding == "stochastic":
            steps = (steps + torch.rand(steps.shape, generator=rng.torch_rng(context.key))).floor()
        whole = steps.round().clamp(-LEVELS, LEVELS).to(torch.int8)
        return whole.reshape(x.shape), {"scale": scale}, memory

    def decode(self, x: Tensor, side: Tensors, memory: Any, context: Context) -> tuple[Tensor, Any]:
        """`x` in float32."""
        if not side and not x.is_floating_point():
            return x, memory
        if x.dtype is not torch.int8:
            raise FedsplitError(f"it is {x.dtype}, not int8")
        values = rows(x).to(torch.float32)
        scale = take(side, "scale", torch.float32, (len(values),))
        return (values * scale.unsqueeze(-1)).reshape(x.shape), memory
