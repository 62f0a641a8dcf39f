"""The card of a finished backbone: what it is, how it was made, how good it is."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedsplit.data import sources
from fedsplit.front.models import Backbone
from fedsplit.pretrain import recipe
from fedsplit.pretrain.probe import linear, top1
from fedsplit.pretrain.recipe import SHAPES, Pretrain
from fedsplit.runs import commit, version
from fedsplit.settings import Data
from fedsplit.types import FedsplitError

if TYPE_CHECKING:
    from fedsplit.pretrain.training import Training


def card(settings: Pretrain, training: Training, weights: Path) -> str:
    """The card as Markdown; the figures are measured with the weights of the file `weights`."""
    position, test = training.position, training.test
    count = sum(p.numel() for p in training.model.parameters())
    kind = "half precision" if settings.half else "float32"
    random, trained = _digits(settings, training)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    shape = SHAPES[settings.model] | {"img_size": settings.image_size, "num_classes": training.classes}
    arguments = ", ".join(f"{name}={value!r}" for name, value in shape.items())
    device = (
        torch.cuda.get_device_name() if training.device.type == "cuda" else f"CPU, torch threads: {settings.threads}"
    )
    return f"""# {settings.title}

`{weights.name}`: {kind}, {count:,} parameters ({weights.stat().st_size / 1e6:.1f} MB), a timm state dict of

    timm.models.vision_transformer.VisionTransformer({arguments})

Input: RGB, {settings.image_size}x{settings.image_size}, `x / 127.5 - 1`. Grey images: repeat the channel.

sha256 of the file: `{digest}`

| check | these weights | random weights |
|---|---|---|
| validation top-1, {training.classes} classes, {len(test):,} images of {training.data_name} | \
{100 * top1(training.backbone, test):.1f} % | {100 / training.classes:.1f} % (chance) |
| linear probe, digits, 1,200 train / 597 test | {trained} | {random} |

- Data: {training.data_name}, {len(training.train):,} images, {training.classes} classes. \
The weights are bound to the terms of these images.
- Training: {position.step:,} steps of {training.batch}, {position.step / training.per_epoch:.1f} epochs, \
{position.trained_s / 60:.1f} minutes in steps, {position.wall_s / 60:.1f} with validation; {device}.
- Recipe: {_recipe(settings)}
- Made with fedsplit {version("fedsplit")} ({commit()}), torch {torch.__version__}, timm {version("timm")}, \
Python {platform.python_version()}, seed {settings.seed}.
- Again: `fedsplit pretrain --config config.toml --out NEW_FOLDER` with the `config.toml` beside this card.
"""


def _recipe(settings: Pretrain) -> str:
    crop = f"scaled to {settings.scaled}, random crop of {settings.image_size}{', flip' if settings.flip else ''}"
    drop = f"{settings.patch_drop:g} of the patches dropped for the first {100 * settings.patch_drop_until:g} %"
    return (
        f"AdamW (lr {settings.lr:g}, betas {settings.beta1:g} and {settings.beta2:g}, weight decay "
        f"{settings.weight_decay:g} on matrices), {100 * settings.warmup:g} % warm-up and cosine; {crop}, jitter "
        f"{settings.jitter:g}, mixup {settings.mixup:g}, label smoothing {settings.smoothing:g}; {drop}; gradient norm "
        f"at most {settings.clip_norm:g}{'; bfloat16' if settings.amp else ''}."
    )


def _digits(settings: Pretrain, training: Training) -> tuple[str, str]:
    """The linear probe with random weights and with these."""
    try:
        data = sources.load(Data(source="digits"), settings.image_size)
        own = training.backbone
        fresh = recipe.network(settings, training.classes, "random").to(training.device)
        pair = (linear(Backbone(fresh, own.image_size, own.mean, own.std), data), linear(own, data))
    except FedsplitError:  # scikit-learn, an extra, holds both the digits and the regression
        return "not measured", "not measured (no scikit-learn)"
    return f"{100 * pair[0]:.1f} %", f"{100 * pair[1]:.1f} %"
