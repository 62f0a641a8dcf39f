"""Networks of an attacker's own in the place of the front: shadow and pilot, and the critic that compares them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fedsplit.attacks.decoders import Residual


class Encoder(nn.Module):
    """Images (B, 3, height, width) in [0, 1] to standardised activations (B, N, C).

    A linear patch embedding, which residual convolutions over the grid refine; the tokens before the patches see
    the mean patch.
    """

    def __init__(self, channels: int, prefix: int, side: int, size: int, width: int) -> None:
        super().__init__()
        step = size // side
        self.embed = nn.Conv2d(3, channels, step, step)
        self.enter = nn.Conv2d(3, width, step, step)
        self.blocks = nn.Sequential(Residual(width), Residual(width), nn.GroupNorm(8, width))
        self.leave = nn.Conv2d(width, channels, 1)
        self.ahead = nn.Linear(channels, prefix * channels) if prefix else None

    def forward(self, images: Tensor) -> Tensor:
        """Activations (B, N, C)."""
        images = 4 * images - 2  # about mean 0 and deviation 1
        patches: Tensor = (self.embed(images) + self.leave(self.blocks(self.enter(images)))).flatten(2).transpose(1, 2)
        if self.ahead is None:
            return patches
        ahead = self.ahead(patches.mean(1)).view(len(images), -1, patches.shape[2])
        return torch.cat([ahead, patches], 1)


class Critic(nn.Module):
    """A score (B,) of activations (B, N, C): the higher, the more they look like the pilot's.

    It has no normalisation over a batch, and gradients of its gradients, which the gradient penalty needs.
    """

    def __init__(self, channels: int, prefix: int, side: int, width: int) -> None:
        super().__init__()
        self.prefix, self.side = prefix, side
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, 2, 1), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.Linear(width * ((side + 1) // 2) ** 2, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B,)."""
        grid = x[:, self.prefix :].transpose(1, 2).reshape(len(x), -1, self.side, self.side)
        return cast(Tensor, self.layers(grid)).squeeze(1)


class Moments:
    """The squared distance of features (B, N, C) to `like` (S, N, C), both standardised, in mean and covariance.

    Means are compared by token and channel, covariances between channels and between tokens.
    """

    def __init__(self, like: Tensor) -> None:
        self.mean = like.mean(0)
        self.channels, self.tokens = _covariances(like - self.mean)

    def __call__(self, features: Tensor) -> Tensor:
        """A scalar, 0 where all of them agree."""
        mean = features.mean(0)
        channels, tokens = _covariances(features - mean)
        off = (channels - self.channels).square().mean() + (tokens - self.tokens).square().mean()
        return (mean - self.mean).square().mean() + off


def _covariances(centred: Tensor) -> tuple[Tensor, Tensor]:
    samples, count, channels = centred.shape
    by_channel = torch.einsum("snc,snd->cd", centred, centred) / (samples * count)
    return by_channel, torch.einsum("snc,smc->nm", centred, centred) / (samples * channels)
