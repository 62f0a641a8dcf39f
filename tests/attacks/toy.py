"""Small fronts, images and transcripts that the attacks are tried on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fedsplit  # noqa: F401  (before torchmetrics: mends torchvision)
from fedsplit import rng
from fedsplit.attacks.base import Knowledge, Transcript
from fedsplit.attacks.patches import to_patches
from fedsplit.rng import torch_rng

SHAPE = (3, 16, 16)
SIDE = 4
Front = Callable[[Tensor], Tensor]


def images(count: int, seed: int = 0) -> Tensor:
    """Smooth random images with some grain, (count, 3, 16, 16) in [0, 1]."""
    draw = torch_rng(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=draw)
    smooth = nn.functional.interpolate(coarse, SHAPE[1:], mode="bilinear")
    return (smooth + 0.1 * torch.randn(count, *SHAPE, generator=draw)).clamp(0, 1)


def identity(x: Tensor) -> Tensor:
    """Tokens that are the pixels of their patches."""
    return to_patches(x, SIDE)


def constant(x: Tensor) -> Tensor:
    """Tokens that say nothing of the image."""
    return 0 * identity(x) + torch.linspace(-1, 1, 3 * SIDE * SIDE)


def embedding(channels: int = 64, tokens: int = 1, seed: int = 0) -> Front:
    """A random patch embedding with `tokens` class tokens and positions, as a bare front has it."""
    draw = torch_rng(seed)
    matrix = torch.randn(3 * SIDE * SIDE, channels, generator=draw) / 7
    places = torch.randn(tokens + 16, channels, generator=draw)

    def front(x: Tensor) -> Tensor:
        patches = (2 * to_patches(x, SIDE) - 1) @ matrix
        return torch.cat([patches.new_zeros(len(x), tokens, channels), patches], 1) + places

    return front


def curved(seed: int = 0) -> Front:
    """An embedding and one small block that mixes tokens: no affine map any more."""
    inner, draw = embedding(seed=seed), torch_rng(seed + 1)
    mix = torch.randn(64, 64, generator=draw) / 8

    def front(x: Tensor) -> Tensor:
        tokens = inner(x)
        return tokens + 0.1 * torch.tanh((tokens + tokens.mean(1, keepdim=True)) @ mix)

    return front


def scaled(front: Front, factor: float | Tensor) -> Front:
    """`front` with its channels times `factor`, one or (C,)."""
    return lambda x: front(x) * factor


def setting(
    front: Front, x: Tensor, tokens: int = 0, noise: float = 0.0, uploads: int = 1
) -> tuple[Transcript, Knowledge]:
    """What the server saw of `x`, and knowledge of the front, of queries to it and of 40 other images."""

    def query(images: Tensor, key: int) -> Tensor:
        seen = front(images)
        return seen + noise * torch.randn(seen.shape, generator=torch_rng(rng.key(key, "noise")))

    activations = torch.stack([query(x, upload) for upload in range(uploads)])
    knowledge = Knowledge(front=front, query=query, auxiliary=images(40, seed=9))
    return Transcript(activations, SHAPE, tokens), knowledge


def ssim(found: Tensor, x: Tensor) -> float:
    """Mean structural similarity, Gaussian window of 11 x 11."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return float(structural_similarity_index_measure(found, x, data_range=1.0))


def psnr(found: Tensor, x: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB."""
    return float((-10 * (found - x).square().mean((1, 2, 3)).clamp(min=1e-12).log10()).mean())
