"""The best linear map from patch tokens to pixels: what a learned decoder starts from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 100
MOST_INPUTS = 2048
PENALTIES = (1e-6, 1e-4, 1e-2, 1.0)


@dataclass(frozen=True)
class Ridge:
    """Images of tokens (B, N, C): the mean image plus, for every patch, `weight` times the tokens around it.

    `weight` is (J, K) for J channels of the tokens and K pixels of a patch; `mean` (P, K) are the mean patches.
    """

    weight: Tensor
    mean: Tensor
    prefix: int

    def __call__(self, tokens: Tensor) -> Tensor:
        """Images (B, 3, height, width)."""
        return torch.cat([self._image(part) for part in tokens.split(CHUNK)])

    def _image(self, tokens: Tensor) -> Tensor:
        pixels = self.mean + _around(tokens, self.prefix, len(self.weight)) @ self.weight
        side, step = int(pixels.shape[1] ** 0.5), int((pixels.shape[2] // 3) ** 0.5)
        return F.pixel_shuffle(pixels.transpose(1, 2).reshape(len(tokens), -1, side, side), step)


def fitted(tokens: Tensor, images: Tensor, prefix: int) -> tuple[Ridge, float]:
    """The linear map of least squares from `tokens` (A, N, C), about 0 on average, to `images`, and its error.

    A patch reads the 3 x 3 tokens around it, or its own alone where that were more than 2048 channels. Of four
    ridge penalties it is the one that serves the last fifth of the images best; the error is that on those images,
    squared and summed, up to a constant.
    """
    patches = _patches(images, tokens.shape[1] - prefix)
    mean = patches.mean(0)
    inputs = 9 * tokens.shape[2] if 9 * tokens.shape[2] <= MOST_INPUTS else tokens.shape[2]
    kept = max(1, len(images) * 4 // 5)
    near = _sums(tokens[:kept], patches[:kept] - mean, prefix, inputs)
    far = _sums(tokens[kept:], patches[kept:] - mean, prefix, inputs)
    # |y - x w|^2 over the held out images, but for what does not depend on w.
    errors = [_error(_solve(*near, penalty), *far) for penalty in PENALTIES]
    least = min(errors)
    weight = _solve(near[0] + far[0], near[1] + far[1], PENALTIES[errors.index(least)])
    return Ridge(weight.float(), mean, prefix), least


def unfitted(tokens: Tensor, images: Tensor, prefix: int) -> Ridge:
    """The mean image, whatever the tokens."""
    patches = _patches(images, tokens.shape[1] - prefix)
    return Ridge(patches.new_zeros(tokens.shape[2], patches.shape[2]), patches.mean(0), prefix)


def _patches(images: Tensor, count: int) -> Tensor:
    """Patches (A, P, K) of `images` in rows, P = `count`."""
    return F.pixel_unshuffle(images, images.shape[2] // int(count**0.5)).flatten(2).transpose(1, 2)


def _around(tokens: Tensor, prefix: int, inputs: int) -> Tensor:
    """What each patch reads, (B, P, `inputs`)."""
    patches = tokens[:, prefix:]
    count, channels = patches.shape[1:]
    if inputs == channels:
        return patches
    side = int(count**0.5)
    grid = patches.transpose(1, 2).reshape(len(patches), channels, side, side)
    return F.unfold(grid, 3, padding=1).transpose(1, 2)


def _sums(tokens: Tensor, targets: Tensor, prefix: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Sums of x x^T (J, J) and x y^T (J, K), float64."""
    square = torch.zeros(inputs, inputs, dtype=torch.float64, device=tokens.device)
    cross = torch.zeros(inputs, targets.shape[2], dtype=torch.float64, device=tokens.device)
    for part, aims in zip(tokens.split(CHUNK), targets.split(CHUNK), strict=True):
        x = _around(part, prefix, inputs).flatten(0, 1).double()
        square += x.T @ x
        cross += x.T @ aims.flatten(0, 1).double()
    return square, cross


def _solve(square: Tensor, cross: Tensor, penalty: float) -> Tensor:
    weight = penalty * square.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    ridge = weight * torch.eye(len(square), dtype=square.dtype, device=square.device)
    found: Tensor = torch.linalg.solve(square + ridge, cross)
    return found


def _error(weight: Tensor, square: Tensor, cross: Tensor) -> float:
    return float((weight * (square @ weight - 2 * cross)).sum())
