"""Bfloat16 on the wire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsplit.types import Tensors
from fedsplit.wire.link import Context


@dataclass(frozen=True)
class Bfloat16:
    """Two bytes a value with the range of float32 and 8 significant bits, back to float32 at the other end.

    Paper: none; common practice.
    Place: wire, any stream.
    Off: not named.
    Deviates: values beyond the largest of the format are clamped, since an infinity would poison the receiver.
    """

    def encode(self, x: Tensor, memory: Any, context: Context) -> tuple[Tensor, Tensors, Any]:
        """`x` in bfloat16; tensors of whole numbers pass."""
        if not x.is_floating_point():
            return x, {}, memory
        limit = torch.finfo(torch.bfloat16).max
        return x.float().clamp(-limit, limit).to(torch.bfloat16), {}, memory

    def decode(self, x: Tensor, side: Tensors, memory: Any, context: Context) -> tuple[Tensor, Any]:
        """`x` in float32."""
        return (x.to(torch.float32) if x.is_floating_point() else x), memory
