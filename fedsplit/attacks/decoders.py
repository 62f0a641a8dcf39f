"""Decoders of activations to images, or to what a linear map leaves of them: what learned attacks train."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedsplit import rng
from fedsplit.types import FedsplitError

Net = TypeVar("Net", bound=nn.Module)
KINDS = ("conv", "transformer", "slots")


def decoder(kind: str, tokens: tuple[int, int], prefix: int, shape: tuple[int, int, int], width: int) -> nn.Module:
    """A new decoder of activations (B, N, C) to corrections (B, 3, height, width) of images.

    `tokens` is (N, C), of which `prefix` tokens precede the patches, in rows; `shape` that of an image. Initial
    weights are drawn from torch's own generator, those of the last layer are 0.

    Raises:
        FedsplitError: an unknown kind, or patches that are no square grid that divides the image.
    """
    count, channels = tokens
    side = grid_side(count - prefix, shape)
    if kind == "conv":
        return ConvDecoder(channels, prefix, side, shape[1], width)
    if kind == "transformer":
        return TransformerDecoder(count, channels, prefix, side, shape[1], width)
    if kind == "slots":
        return SlotsDecoder(count, channels, prefix, side, shape[1], width)
    raise FedsplitError(f"There is no decoder '{kind}'; known: {', '.join(KINDS)}.")


def grid_side(patches: int, shape: tuple[int, int, int]) -> int:
    """Patches along a side of an image of `shape`.

    Raises:
        FedsplitError: they are no square grid that divides the image.
    """
    side = math.isqrt(patches)
    if not side or side * side != patches or shape[1] % side or shape[1] != shape[2]:
        raise FedsplitError(
            f"{patches} patch tokens are no square grid over an image of {shape[1]} x {shape[2]} pixels; "
            "learned attacks need one."
        )
    return side


def drawn(make: Callable[[], Net], key: int, like: Tensor) -> Net:
    """The network that `make` makes, its weights drawn by `key`, on the device of `like`."""
    with torch.random.fork_rng():
        torch.manual_seed(rng.key(key, "weights"))
        return make().to(like.device)


class ConvDecoder(nn.Module):
    """A residual convolutional decoder over the grid of patch tokens, as in ResSFL's attackers (arXiv 2205.04007)."""

    def __init__(self, channels: int, prefix: int, side: int, size: int, width: int) -> None:
        super().__init__()
        self.prefix, self.side = prefix, side
        step = size // side
        self.enter = nn.Conv2d(channels, width, 1)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(3)))
        self.leave = _zero(nn.Conv2d(width, 3 * step * step, 1))
        self.grow = nn.PixelShuffle(step)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, height, width) of activations (B, N, C)."""
        patches = x[:, self.prefix :]
        grid = patches.transpose(1, 2).reshape(len(x), -1, self.side, self.side)
        image: Tensor = self.grow(self.leave(self.blocks(self.enter(grid))))
        return image


class TransformerDecoder(nn.Module):
    """A small transformer over all tokens and a linear map to pixels: the "detokenizer" of DRAG's baselines."""

    def __init__(self, count: int, channels: int, prefix: int, side: int, size: int, width: int) -> None:
        super().__init__()
        self.prefix, self.side, self.step = prefix, side, size // side
        self.enter = nn.Linear(channels, width)
        self.places = nn.Parameter(torch.randn(1, count, width) * 0.02)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer(width)), 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.leave = _zero(nn.Linear(width, 3 * self.step * self.step))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, height, width) of activations (B, N, C)."""
        seen = self.leave(self.norm(self.layers(self.enter(x) + self.places)))
        return _image(seen[:, self.prefix :], self.side, self.step)


class SlotsDecoder(nn.Module):
    """A decoder for patch tokens in no order: what it makes of them does not depend on theirs.

    As in DETR (arXiv 2005.12872): tokens are encoded without positions, and each patch of the image is a learned
    query that attends to all of them.
    """

    def __init__(self, count: int, channels: int, prefix: int, side: int, size: int, width: int) -> None:
        super().__init__()
        self.prefix, self.side, self.step = prefix, side, size // side
        self.enter = nn.Linear(channels, width)
        self.first = nn.Parameter(torch.randn(1, prefix, width) * 0.02)
        self.places = nn.Parameter(torch.randn(1, count - prefix, width))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer(width)), 1, enable_nested_tensor=False)
        self.layers = nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer(width)), 2)
        self.norm = nn.LayerNorm(width)
        self.leave = _zero(nn.Linear(width, 3 * self.step * self.step))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, height, width) of activations (B, N, C)."""
        tokens = self.enter(x)
        tokens = self.encoder(torch.cat([tokens[:, : self.prefix] + self.first, tokens[:, self.prefix :]], 1))
        seen = self.leave(self.norm(self.layers(self.places.expand(len(x), -1, -1), tokens)))
        return _image(seen, self.side, self.step)


class Residual(nn.Module):
    """Two normalised 3 x 3 convolutions over a grid (B, width, side, side), added to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width), nn.GELU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.GELU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """The grid, refined."""
        refined: Tensor = x + self.body(x)
        return refined


def _zero(last: Net) -> Net:
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    return last


def layer(width: int) -> dict[str, Any]:
    """How a layer of the transformers here is made."""
    return {
        "d_model": width, "nhead": max(1, width // 32), "dim_feedforward": 4 * width, "dropout": 0.0,
        "activation": "gelu", "batch_first": True, "norm_first": True,
    }  # fmt: skip


def _image(patches: Tensor, side: int, step: int) -> Tensor:
    """Images (B, 3, height, width) of the pixels (B, N, 3 step step) of patches in rows."""
    grid = patches.transpose(1, 2).reshape(len(patches), -1, side, side)
    return nn.functional.pixel_shuffle(grid, step)
