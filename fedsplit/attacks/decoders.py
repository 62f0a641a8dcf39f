"""Decoders of activations to images: the networks that learned attacks train."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fedsplit.types import FedsplitError


def decoder(kind: str, tokens: tuple[int, int], prefix: int, shape: tuple[int, int, int], width: int) -> nn.Module:
    """A new decoder of activations (B, N, C) to images (B, 3, height, width) in [0, 1].

    `tokens` is (N, C), of which `prefix` tokens precede the patches, in rows; `shape` that of an image. Initial
    weights are drawn from torch's own generator.

    Raises:
        FedsplitError: an unknown kind, or patches that are no square grid that divides the image.
    """
    count, channels = tokens
    side = math.isqrt(count - prefix)
    if side * side != count - prefix or shape[1] % side or shape[2] % side or shape[1] != shape[2]:
        raise FedsplitError(
            f"{count - prefix} patch tokens are no square grid over an image of {shape[1]} x {shape[2]} pixels; "
            "learned attacks need one."
        )
    if kind == "conv":
        return ConvDecoder(channels, prefix, side, shape[1], width)
    if kind == "transformer":
        return TransformerDecoder(count, channels, prefix, side, shape[1], width)
    raise FedsplitError(f"There is no decoder '{kind}'; known: conv, transformer.")


class ConvDecoder(nn.Module):
    """A residual convolutional decoder over the grid of patch tokens, as in ResSFL's attackers (arXiv 2205.04007)."""

    def __init__(self, channels: int, prefix: int, side: int, size: int, width: int) -> None:
        super().__init__()
        self.prefix, self.side = prefix, side
        self.enter = nn.Conv2d(channels, width, 1)
        self.blocks = nn.Sequential(*(_Residual(width) for _ in range(3)))
        step = size // side
        self.leave = nn.Sequential(nn.Conv2d(width, 3 * step * step, 1), nn.PixelShuffle(step))
        self.smooth = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, padding=1), nn.GELU(), nn.Conv2d(width // 2, 3, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, height, width) of activations (B, N, C)."""
        patches = x[:, self.prefix :]
        grid = patches.transpose(1, 2).reshape(len(x), -1, self.side, self.side)
        coarse = self.leave(self.blocks(self.enter(grid)))
        return torch.sigmoid(coarse + self.smooth(coarse))


class TransformerDecoder(nn.Module):
    """A small transformer over all tokens and a linear map to pixels: the "detokenizer" of DRAG's baselines."""

    def __init__(self, count: int, channels: int, prefix: int, side: int, size: int, width: int) -> None:
        super().__init__()
        self.prefix, self.side, self.step = prefix, side, size // side
        self.enter = nn.Linear(channels, width)
        self.places = nn.Parameter(torch.randn(1, count, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 32), 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, 3 * self.step * self.step)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, height, width) of activations (B, N, C)."""
        seen = self.norm(self.layers(self.enter(x) + self.places))[:, self.prefix :]
        pixels = self.leave(seen).transpose(1, 2).reshape(len(x), -1, self.side, self.side)
        return torch.sigmoid(nn.functional.pixel_shuffle(pixels, self.step))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width), nn.GELU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.GELU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        refined: Tensor = x + self.body(x)
        return refined
