"""What a training image goes through: crop, flip, colour jitter, mixup; a whole batch at once, on its device."""

from __future__ import annotations

import torch
from timm.data.mixup import mixup_target
from torch import Tensor

from fedsplit.pretrain.recipe import Pretrain
from fedsplit.rng import key, numpy_rng, torch_rng


def views(pixels: Tensor, settings: Pretrain, stream: int) -> Tensor:
    """Random views of `pixels` (B, scaled, scaled, 3) uint8 as (B, 3, image-size, image-size) float32 in [-1, 1].

    The draws are made on the CPU, so that every device sees the same views.
    """
    count, high, _, _ = pixels.shape
    size = settings.image_size
    rng = torch_rng(stream)
    corner = torch.randint(0, high - size + 1, (2, count, 1), generator=rng)
    flip = torch.rand(count, 1, generator=rng) < (0.5 if settings.flip else 0.0)
    spread = torch.rand(count, 4, generator=rng) * 2 - 1
    rows = corner[0] + torch.arange(size)
    columns = corner[1] + torch.arange(size)
    columns = torch.where(flip, columns.flip(1), columns)
    each = torch.arange(count, device=pixels.device)[:, None, None]
    crop = pixels[each, rows[:, :, None].to(pixels.device), columns[:, None, :].to(pixels.device)]
    x = crop.permute(0, 3, 1, 2).float()
    if settings.jitter:
        gain = (1 + settings.jitter * spread[:, :1]) * (1 + settings.jitter / 2 * spread[:, 1:])
        x = (x * gain[:, :, None, None].to(x.device)).clamp_(0, 255)
    return x.div_(127.5).sub_(1).contiguous()


def mix(x: Tensor, y: Tensor, classes: int, settings: Pretrain, stream: int) -> tuple[Tensor, Tensor]:
    """Mixup of `x` (B, 3, h, w) with its own reverse; the target (B, classes) is smoothed and mixed alike."""
    share = float(numpy_rng(key(stream, "mixup")).beta(settings.mixup, settings.mixup)) if settings.mixup else 1.0
    target: Tensor = mixup_target(y, classes, share, settings.smoothing)  # type: ignore[no-untyped-call]
    return (x if share == 1.0 else torch.lerp(x.flip(0), x, share)), target
