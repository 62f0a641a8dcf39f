"""From images to the tensors of a training step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsplit.rng import torch_rng
from fedsplit.types import Batch, Images

Augment = Literal["none", "flip", "crop-flip"]
Rgb = tuple[float, float, float]


def batches(indices: npt.NDArray[np.int64], batch_size: int, stream: int) -> Iterator[npt.NDArray[np.int64]]:
    """One epoch over `indices` (S,): every one once, shuffled by `stream`; the last batch may be smaller."""
    order = torch.randperm(len(indices), generator=torch_rng(stream)).numpy()
    for start in range(0, len(indices), batch_size):
        yield indices[order[start : start + batch_size]]


def augment(x: Tensor, kind: str, stream: int) -> Tensor:
    """A random view of each image of `x` (B, 3, height, width) uint8, same shape; "none" gives `x` itself.

    "flip" mirrors an image with probability 1/2. "crop-flip" also moves it by up to height // 8
    pixels each way, the border reflected.
    """
    if kind == "none":
        return x
    count, _, high, wide = x.shape
    rng = torch_rng(stream)
    # Drawn on the CPU, so that every device agrees; the flip first, so that both kinds flip alike.
    flip = torch.rand(count, 1, generator=rng) < 0.5
    pad = high // 8 if kind == "crop-flip" else 0
    shift = torch.randint(-pad, pad + 1, (2, count, 1), generator=rng)
    rows = _reflect(torch.arange(high) + shift[0], high)
    columns = _reflect(torch.arange(wide) + shift[1], wide)
    columns = torch.where(flip, columns.flip(1), columns)
    each = torch.arange(count)[:, None, None].to(x.device)
    picked = x.permute(0, 2, 3, 1)[each, rows[:, :, None].to(x.device), columns[:, None, :].to(x.device)]
    return picked.permute(0, 3, 1, 2).contiguous()


def to_batch(
    images: Images,
    idx: npt.NDArray[np.int64],
    mean: Rgb,
    std: Rgb,
    kind: str,
    stream: int,
    device: torch.device | str,
) -> Batch:
    """The samples `idx` (B,) as a batch: `x = (pixels / 255 - mean) / std`, `ids` = `idx`.

    `mean` and `std` are one figure a channel for pixels between 0 and 1; `kind` and `stream` are
    those of `augment`.
    """
    pixels = torch.from_numpy(np.array(images.pixels[idx])).permute(0, 3, 1, 2).contiguous()
    x = augment(pixels, kind, stream).to(device).float() / 255
    x = (x - _channels(mean, device)) / _channels(std, device)
    labels = torch.from_numpy(np.array(images.labels[idx], dtype=np.int64)).to(device)
    return Batch(x, labels, torch.from_numpy(np.array(idx, dtype=np.int64)).to(device))


def _channels(figures: Rgb, device: torch.device | str) -> Tensor:
    return torch.tensor(figures, dtype=torch.float32, device=device).view(1, 3, 1, 1)


def _reflect(position: Tensor, size: int) -> Tensor:
    """Positions up to `size` - 1 beyond an axis, reflected at its first and last pixel."""
    return (size - 1) - ((size - 1) - position.abs()).abs()
