"""Coarse activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.front.guard import Guard, put
from fedsplit.types import Cut, knob


@dataclass(frozen=True)
class Quantize:
    """Rounds every entry to one of 2^bits equally spaced levels between the ends of its token's range.

    Paper: none for the defence; the gradient passes straight through, arXiv 1308.3432, section 4.
    Place: front.edits.
    Off: bits = 32.
    Deviates: what crosses the wire are still floats, and their bytes do not shrink: what is sent in how many
        bits is the business of a codec. Here only what they say of the image gets less.
    """

    bits: int = knob(4, "2^bits levels; 32 is off", low=1, high=32)
    span: str = knob(
        "minmax",
        "a token's range: from its smallest entry to its largest, or 'absmax', its largest magnitude to either side",
        choices=("minmax", "absmax"),
    )

    def edit(self, vit: nn.Module, cut: Cut, key: int) -> nn.Module:
        """`vit` with the rounding at the end of the front.

        Raises:
            FedsplitError: nothing crosses this cut.
        """
        return put(vit, cut, "quantize", Round(self.bits, self.span)) if self.bits < 32 else vit


class Round(Guard):
    """Tokens (B, N, C), each on its own levels."""

    def __init__(self, bits: int, span: str) -> None:
        super().__init__()
        self.bits, self.span = bits, span

    def act(self, x: Tensor) -> Tensor:
        """`x` (B, N, C), rounded; the gradient is that of the identity."""
        rounded: Tensor = _StraightThrough.apply(x, self.bits, self.span)  # type: ignore[no-untyped-call]
        return rounded


class _StraightThrough(torch.autograd.Function):
    # Not `x + (q - x).detach()`: the last bits of that sum still tell x.

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, span: str) -> Tensor:
        exact = x.double()
        high = (exact if span == "minmax" else exact.abs()).amax(-1, keepdim=True)
        low = exact.amin(-1, keepdim=True) if span == "minmax" else -high
        step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float64).tiny)
        rounded: Tensor = low + ((exact - low) / step).round() * step
        return rounded.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None
