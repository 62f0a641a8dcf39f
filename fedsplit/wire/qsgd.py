"""QSGD: few random levels of a bucket's norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsplit import rng
from fedsplit.types import Tensors, knob
from fedsplit.wire.link import Context
from fedsplit.wire.parts import pack_levels, shape_part, take, take_shape, unpack_levels


@dataclass(frozen=True)
class Qsgd:
    """Each value of a bucket as sign and one of `levels` + 1 multiples of norm / levels, right on average.

    Paper: arXiv 1610.02132 (QSGD), eq. 1 (the rounding) and section 4 (buckets).
    Place: wire, any stream.
    Off: not named.
    Deviates: shares are of a bucket's largest value, which adds less noise, unless `norm` is l2, as in eq. 1. Levels
        are packed at log2(2 levels + 1) bits, rounded up, not in Elias code: the length is then known beforehand,
        and zstd after it takes back some of the difference.
    """

    levels: int = knob(7, "levels beside zero: 1 takes 2 bits a value, 3 three, 7 four, 127 eight", low=1, high=127)
    norm: str = knob("max", "what the levels are shares of: a bucket's 'max', or its 'l2' norm", choices=("max", "l2"))
    bucket: int = knob(512, "values that share a norm; 0 is the whole tensor", low=0)

    @property
    def bits(self) -> int:
        """Bits a value."""
        return math.ceil(math.log2(2 * self.levels + 1))

    def encode(self, x: Tensor, memory: Any, context: Context) -> tuple[Tensor, Tensors, Any]:
        """Packed levels (bytes,) uint8, with side tensors `norm` (buckets,) and `shape`; whole numbers pass."""
        if not x.is_floating_point():
            return x, {}, memory
        values = self._buckets(x.reshape(-1).to(torch.float32))
        peak = values.abs().amax(-1) if values.numel() else values.new_zeros(len(values))
        unit = values / peak.where(peak > 0, torch.ones(())).unsqueeze(-1)
        # The norm of values brought near 1 first: squares of small ones would vanish.
        norm = peak * unit.norm(dim=-1) if self.norm == "l2" else peak
        share = values.abs() / norm.where(norm > 0, torch.ones(())).unsqueeze(-1)
        draw = torch.rand(share.shape, generator=rng.torch_rng(context.key))
        level = (share * self.levels + draw).floor().clamp(0, self.levels) * values.sign()
        whole = (level.reshape(-1)[: x.numel()] + self.levels).to(torch.uint8)
        return pack_levels(whole, self.bits), {"norm": norm} | shape_part(x), memory

    def decode(self, x: Tensor, side: Tensors, memory: Any, context: Context) -> tuple[Tensor, Any]:
        """`x` in float32."""
        if not side and not x.is_floating_point():
            return x, memory
        shape = take_shape(side, context.most)
        size = math.prod(shape)
        whole = unpack_levels(x, size, self.bits)
        level = self._buckets(whole.to(torch.float32) - self.levels)
        norm = take(side, "norm", torch.float32, (len(level),))
        values = level.clamp(-self.levels, self.levels) * (norm / self.levels).unsqueeze(-1)
        return values.reshape(-1)[:size].reshape(shape), memory

    def _buckets(self, flat: Tensor) -> Tensor:
        """Values (d,) as buckets (d / bucket, bucket), the last filled with 0."""
        width = min(self.bucket or len(flat), len(flat)) or 1
        return torch.nn.functional.pad(flat, (0, -len(flat) % width)).reshape(-1, width)
