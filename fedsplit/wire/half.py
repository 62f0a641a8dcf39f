"""Half precision on the wire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsplit.types import Tensors
from fedsplit.wire.link import Context


@dataclass(frozen=True)
class Half:
    """IEEE half precision: two bytes a value, back to float32 at the other end.

    Paper: none; common practice.
    Place: wire, any stream.
    Off: not named.
    Deviates: values beyond 65,504 are clamped, since an infinity would poison the receiver.
    """

    def encode(self, x: Tensor, memory: Any, context: Context) -> tuple[Tensor, Tensors, Any]:
        """`x` in float16; tensors of whole numbers pass."""
        if not x.is_floating_point():
            return x, {}, memory
        limit = torch.finfo(torch.float16).max
        return x.float().clamp(-limit, limit).to(torch.float16), {}, memory

    def decode(self, x: Tensor, side: Tensors, memory: Any, context: Context) -> tuple[Tensor, Any]:
        """`x` in float32."""
        return (x.to(torch.float32) if x.is_floating_point() else x), memory
