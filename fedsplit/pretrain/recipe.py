"""The keys of `fedsplit pretrain`, and what they build: network, optimiser, schedule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.layers.patch_dropout import PatchDropout
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fedsplit.config import load_as
from fedsplit.front.models import SHAPES as SHAPES
from fedsplit.rng import key
from fedsplit.types import FedsplitError, Scalar, knob


@dataclass(frozen=True)
class Pretrain:
    """The keys of one pre-training run."""

    name: str = knob("", "name of the weights file; empty is the model's")
    seed: int = knob(0, "decides every random draw", low=0)
    out: str = knob("", "folder of checkpoint, card and weights; empty is runs/pretrain-<name>")
    data: str = knob(
        "digits", "'digits', a folder with train.parquet and test.parquet, or a Hugging Face data set name"
    )
    limit: int = knob(0, "use only the first so many training images; 0 is all", low=0)
    cache: str = knob("", "folder for decoded images; empty is the user's cache folder")
    model: str = knob("fedsplit_micro", "shape of the network", choices=tuple(SHAPES))
    image_size: int = knob(32, "input height and width in pixels, a multiple of the patch", low=4)
    scale_size: int = knob(
        0, "images are scaled to so many pixels and cropped at random; 0 is 9/8 of image-size", low=0
    )
    epochs: int = knob(0, "passes over the training set; 0 is no such budget", low=0)
    minutes: float = knob(0.0, "minutes of training steps, validation comes on top; 0 is no such budget", low=0.0)
    batch_size: int = knob(128, "images per step", low=1)
    lr: float = knob(2e-3, "largest learning rate of AdamW", low=0.0)
    warmup: float = knob(0.05, "fraction of the run in which the learning rate rises from 0", low=0.0, high=0.9)
    weight_decay: float = knob(0.05, "weight decay of matrices; vectors and position embeddings have none", low=0.0)
    beta1: float = knob(0.9, "decay of AdamW's first moment", low=0.0, high=0.9999)
    beta2: float = knob(0.98, "decay of AdamW's second moment", low=0.0, high=0.99999)
    mixup: float = knob(0.2, "alpha of mixup's Beta distribution; 0 is off", low=0.0)
    smoothing: float = knob(0.1, "label smoothing", low=0.0, high=0.99)
    flip: bool = knob(True, "mirror half of the images")
    jitter: float = knob(
        0.2, "brightness varies by this fraction, each channel by half of it; 0 is off", low=0.0, high=1.0
    )
    patch_drop: float = knob(0.5, "fraction of the patches left out of a training step; 0 is off", low=0.0, high=0.95)
    patch_drop_until: float = knob(0.8, "fraction of the run after which every patch takes part", low=0.0, high=1.0)
    clip_norm: float = knob(1.0, "largest global gradient norm; 0 is off", low=0.0)
    threads: int = knob(1, "torch threads; results depend on it", low=1)
    device: str = knob("cpu", "where the training runs: cpu, cuda or auto", choices=("cpu", "cuda", "auto"))
    amp: bool = knob(False, "compute in bfloat16 where it helps; CUDA only")
    half: bool = knob(False, "write the weights in half precision")
    checkpoint_minutes: float = knob(5.0, "minutes between checkpoints; 0 saves after every step", low=0.0)

    @property
    def title(self) -> str:
        """The name of what is made."""
        return self.name or self.model

    @property
    def scaled(self) -> int:
        """Height and width in pixels of the training images before the crop."""
        return self.scale_size or self.image_size * 9 // 8

    def values(self) -> dict[str, Scalar]:
        """Every key with its value."""
        return {name.replace("_", "-"): value for name, value in dataclasses.asdict(self).items()}


def load(files: Iterable[str | Path] = (), pairs: Iterable[str] = ()) -> Pretrain:
    """The keys from TOML files and `key=value` pairs, later ones winning.

    Raises:
        FedsplitError: an unknown key, a wrong type or value, or keys that do not go together.
    """
    settings = load_as(Pretrain, files, pairs)
    check(settings)
    return settings


def check(settings: Pretrain) -> None:
    """Refuse keys that do not go together."""
    patch = SHAPES[settings.model]["patch_size"]
    if not settings.epochs and not settings.minutes:
        raise FedsplitError("Say how long to train: set epochs or minutes (whichever ends first ends the run).")
    if settings.image_size % patch:
        raise FedsplitError(
            f"image-size={settings.image_size} must be a multiple of {settings.model}'s patch of {patch}."
        )
    if settings.scaled < settings.image_size:
        raise FedsplitError(f"scale-size={settings.scaled} must be at least image-size={settings.image_size}.")
    if "/" in settings.title:
        raise FedsplitError(
            f"name='{settings.name}' must be a file name without folders; set 'out' to choose the folder."
        )


def network(settings: Pretrain, classes: int, stream: str = "model") -> VisionTransformer:
    """A new network of `settings.model` with a classifier for `classes`, the same for the same seed and stream."""
    torch.manual_seed(key(settings.seed, stream))
    shape = SHAPES[settings.model] | {"img_size": settings.image_size}
    return VisionTransformer(num_classes=classes, patch_drop_rate=settings.patch_drop, **shape)


def optimizer(settings: Pretrain, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW; only matrices decay."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim > 1 and name != "pos_embed" else rest).append(parameter)
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2))


def progress(settings: Pretrain, step: int, steps_per_epoch: int, trained_s: float) -> float:
    """How much of the run is over after `step` steps in `trained_s` seconds: 0 to 1, of the budget that ends first."""
    by_steps = step / (settings.epochs * steps_per_epoch) if settings.epochs else 0.0
    by_time = trained_s / (60 * settings.minutes) if settings.minutes else 0.0
    return min(1.0, max(by_steps, by_time))


def rate(settings: Pretrain, done: float) -> float:
    """The learning rate when fraction `done` of the run is over: a linear rise, then a cosine to 0."""
    if done < settings.warmup:
        return settings.lr * done / settings.warmup
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (done - settings.warmup) / (1 - settings.warmup)))


def schedule(settings: Pretrain, model: nn.Module, optimizer: torch.optim.Optimizer, done: float) -> float:
    """Set learning rate and patch dropout for fraction `done` of the run; returns the learning rate."""
    lr = rate(settings, done)
    for group in optimizer.param_groups:
        group["lr"] = lr
    for module in model.modules():
        if isinstance(module, PatchDropout):
            module.prob = settings.patch_drop if done < settings.patch_drop_until else 0.0
    return lr
