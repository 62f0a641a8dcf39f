"""Patches of images, and the scale of the activations that stand for them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedsplit.attacks.base import NotApplicable, Transcript

FLAT = 1e-3


def patch_side(transcript: Transcript) -> int:
    """The side, in pixels, of the square patch that each of the N - `tokens` patch tokens stands for.

    Raises:
        NotApplicable: no grid of square patches over the image has so many.
    """
    _, height, width = transcript.shape
    count = transcript.activations.shape[-2] - transcript.tokens
    side = math.isqrt(height * width // count) if count > 0 else 0
    if side == 0 or height % side or width % side or (height // side) * (width // side) != count:
        raise NotApplicable(
            f"{count} patch tokens are no grid of square patches over an image of {height} x {width} pixels, "
            "so no pixels belong to a token."
        )
    return side


def to_patches(images: Tensor, side: int) -> Tensor:
    """Images (B, 3, height, width) as their patches, row by row, (B, N, 3 * side * side)."""
    return torch.nn.functional.unfold(images, side, stride=side).transpose(1, 2)


def to_images(patches: Tensor, shape: tuple[int, int, int], side: int) -> Tensor:
    """What `to_patches` took apart, (B, 3, height, width)."""
    return torch.nn.functional.fold(patches.transpose(1, 2), shape[1:], side, stride=side)


def weights(activations: Tensor) -> Tensor:
    """What brings every channel of `activations` (..., C) to standard deviation 1, (C,) float64; see `inverse_scale`.

    A front that scales its channels, all or each by a factor of its own, hides nothing from an attack on
    activations times these weights.
    """
    flat = activations.reshape(-1, activations.shape[-1]).double()
    return inverse_scale((flat - flat.mean(0)).square().mean(0), flat.square().mean(0))


def inverse_scale(variance: Tensor, power: Tensor) -> Tensor:
    """1 / standard deviation of channels of this variance and mean square, (C,) each.

    A channel that hardly varies is brought to magnitude 1 / FLAT at most, as what varies in it may be rounding
    alone; a channel of zeros gets 0.
    """
    scale = torch.maximum(variance.clamp(min=0).sqrt(), FLAT * power.sqrt())
    return torch.where(scale > 0, 1 / scale, 0.0)
