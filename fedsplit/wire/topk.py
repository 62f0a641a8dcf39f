"""The largest values of a tensor, and the largest of each token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsplit.types import FedsplitError, Tensors, knob
from fedsplit.wire.link import Context
from fedsplit.wire.parts import count_of, largest, rows, shape_part, take_shape, take_where, where_part


@dataclass(frozen=True)
class TopK:
    """The share `keep` of a tensor's values that are largest by magnitude; the others arrive as zero.

    Paper: arXiv 1704.05021 (Gradient Dropping), with a threshold for each tensor; upload of arXiv 2412.19989 (Caesar).
    Place: wire, any stream; on parameters after delta, since it is changes that may be zero. The kept values,
        (k,), are what the next stage sees.
    Off: keep = 1.
    Deviates: positions are packed bits, or a list where that is shorter, which the two counts decide; of equal
        values the first are kept, so that their number is exact.
    """

    keep: float = knob(0.1, "share of the values that is sent; 1.0 is all", above=0.0, high=1.0)

    def encode(self, x: Tensor, memory: Any, context: Context) -> tuple[Tensor, Tensors, Any]:
        """The kept values (k,), with side tensors `mask` or `index`, and `shape`; whole numbers pass."""
        if self.keep == 1 or not x.is_floating_point():
            return x, {}, memory
        return _kept(x, x.reshape(1, -1), self.keep, memory)

    def decode(self, x: Tensor, side: Tensors, memory: Any, context: Context) -> tuple[Tensor, Any]:
        """`x` with zeros where nothing was sent."""
        if self.keep == 1 or (not side and not x.is_floating_point()):
            return x, memory
        shape = take_shape(side, context.most)
        return _spread(x, side, shape, count_of(math.prod(shape), self.keep)), memory


@dataclass(frozen=True)
class TokenTopK:
    """The share `keep` of each token's channels that are largest by magnitude; the others arrive as zero.

    Paper: none; top-k of arXiv 1704.05021 by token, so that no token arrives empty.
    Place: wire, activations and their gradients; of a parameter a token is a row of its last axis. The next
        stage sees the kept values (tokens, k).
    Off: keep = 1.
    Deviates: as topk.
    """

    keep: float = knob(0.25, "share of each token's channels that is sent; 1.0 is all", above=0.0, high=1.0)

    def encode(self, x: Tensor, memory: Any, context: Context) -> tuple[Tensor, Tensors, Any]:
        """The kept values (tokens, k), with side tensors `mask` or `index`, and `shape`; whole numbers pass."""
        if self.keep == 1 or not x.is_floating_point():
            return x, {}, memory
        kept, side, memory = _kept(x, rows(x), self.keep, memory)
        return kept.reshape(len(rows(x)), -1), side, memory

    def decode(self, x: Tensor, side: Tensors, memory: Any, context: Context) -> tuple[Tensor, Any]:
        """`x` with zeros where nothing was sent."""
        if self.keep == 1 or (not side and not x.is_floating_point()):
            return x, memory
        shape = take_shape(side, context.most)
        tokens = math.prod(shape[:-1]) if math.prod(shape) else 1
        return _spread(x.reshape(-1), side, shape, tokens * count_of(math.prod(shape) // tokens, self.keep)), memory


def _kept(x: Tensor, tokens: Tensor, keep: float, memory: Any) -> tuple[Tensor, Tensors, Any]:
    """The share `keep` of each row of `tokens` (R, D), and where they stand."""
    if not x.numel():
        return x.reshape(-1), where_part(torch.zeros(0, dtype=torch.bool)) | shape_part(x), memory
    mask = largest(tokens, count_of(tokens.shape[1], keep)).reshape(-1)
    return x.reshape(-1).masked_select(mask), where_part(mask) | shape_part(x), memory


def _spread(x: Tensor, side: Tensors, shape: tuple[int, ...], count: int) -> Tensor:
    if x.shape != (count,) or not x.is_floating_point():
        raise FedsplitError(f"it has values {tuple(x.shape)} where {count} belong")
    mask = take_where(side, math.prod(shape), count)
    out = torch.zeros(math.prod(shape), dtype=x.dtype)
    return out.masked_scatter_(mask, x).reshape(shape)
