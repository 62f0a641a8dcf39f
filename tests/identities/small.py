"""Small worlds and their unsplit reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsplit.client import plan_batches
from fedsplit.config import Config, resolve
from fedsplit.data.batches import to_batch
from fedsplit.experiment import start
from fedsplit.rng import key
from fedsplit.types import Job, Scalar, Tensors, Update
from fedsplit.wire.frame import pack, unpack
from fedsplit.world import World, world

SMALL: dict[str, Scalar] = {
    "data.limit": 60,
    "data.test-limit": 20,
    "data.partition": "iid",
    "devices.count": 1,
    "rounds": 1,
    "optimizer.name": "sgd",
    "optimizer.lr": 0.03,
    "local.batch-size": 8,
    "local.max-steps": 5,
}
MODELS: dict[str, dict[str, Scalar]] = {
    "cls": {"model.name": "vit_tiny_patch16_224", "model.image-size": 32, "model.pretrained": False},
    "avg": {"model.name": "fedsplit_micro"},
}


def small(**changes: Scalar) -> Config:
    """A config of seconds; `cut__front=1` is `cut.front=1`."""
    return resolve(SMALL).replace(**changes)


def model(kind: str, **changes: Scalar) -> Config:
    """A small config with the CLS or the average-pooled model."""
    return resolve({**SMALL, **MODELS[kind]}).replace(**changes)


@dataclass
class Reference:
    """The same training without a split: timm's own forward, one optimiser, one autograd graph."""

    vit: nn.Module
    losses: list[float]
    gradients: Tensors


def job_of(built: World, client: int = 0, number: int = 1) -> Job:
    """The first round's job for a client."""
    model = start(built).model
    down = built.link(number, client).encode("parameters-down", {name: model[name] for name in built.client})
    return Job(client, number, 0, down, pack({name: model[name] for name in built.server}))


def tensors_of(update: Update, built: World | None = None) -> Tensors:
    """Everything that trained, from both sides' frames; `built` is of the codecs, if there are any."""
    up = built.link(1, update.client).decode("parameters-up", update.up) if built else unpack(update.up)
    return {**up, **unpack(update.server)}


def unsplit(config: Config, make: Callable[[Any], torch.optim.Optimizer]) -> Reference:
    """Train the whole model on the client's very batches with `make(parameters)` as optimiser."""
    built = world(config)
    built.load(built.initial)
    vit: Any = copy.deepcopy(built.backbone.vit)
    step = 0

    def seed(address: int | str) -> Callable[..., None]:
        return lambda *_: torch.manual_seed(key(built.key("noise", 1, 0, step), address)) and None

    vit.patch_embed.register_forward_pre_hook(seed("embedding"))
    vit.norm_pre.register_forward_hook(lambda _module, _inputs, tokens: tokens.contiguous())
    vit.norm.register_forward_pre_hook(seed("head"))
    for number, block in enumerate(vit.blocks):
        block.register_forward_pre_hook(seed(number), prepend=True)  # before its prompts
    for name, guard in vit.guard.named_children() if hasattr(vit, "guard") else ():
        guard.register_forward_pre_hook(seed(f"guard.{name}"))
        vit.guard.register_forward_hook(seed(built.cut.front))  # the block that they precede was seeded before them
    vit.train()
    trained = {name: p for name, p in vit.named_parameters() if p.requires_grad}
    optimizer = make(list(trained.values()))
    losses: list[float] = []
    job = job_of(built)
    for indices, stream in plan_batches(built, job, built.shards[job.client]):
        batch = to_batch(built.data.train, indices, kind=config.data.augment, stream=stream, **built.look)
        optimizer.zero_grad()
        loss: Tensor = F.cross_entropy(vit(batch.x), batch.y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        step += 1
    return Reference(vit, losses, {name: p.grad for name, p in trained.items() if p.grad is not None})
