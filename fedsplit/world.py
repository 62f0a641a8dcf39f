"""Config to objects: what every process of a run builds for itself, the same everywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedsplit.config import Config, resolve
from fedsplit.data.partitions import deal, hold_out
from fedsplit.data.sources import load
from fedsplit.devices.profiles import Profile, fleet_of
from fedsplit.front import models, trainable
from fedsplit.front.cache import FrontCache
from fedsplit.front.prune import shape_of
from fedsplit.front.vit import Part, Parts, Start, opening, shortcut, split
from fedsplit.layout import (
    address,
    by_side,
    has_local_head,
    kept_until,
    local_reads,
    pick_device,
    planned_blocks,
    pooling,
)
from fedsplit.metrics.flops import StepFlops, step_flops
from fedsplit.metrics.plan_flops import PlanFlops
from fedsplit.rng import key
from fedsplit.types import STREAMS, Cut, DataSet, FedsplitError, Tensors
from fedsplit.wire.codec import MOST_VALUES, Codecs, Tap
from fedsplit.wire.link import Link

DEFAULT_DEVICES = 10
LOCAL_KEYS = ("out", "resume", "name", "eval.every", "track")
LOCAL_SECTIONS = ("engine.", "link.", "audit.", "harden.")
# Worlds of other choices that are kept at a time: those of a round, in which each is asked for more than once.
MOST_STEERED = 256

Indices = npt.NDArray[np.int64]
Dealt = tuple[DataSet, Sequence[Indices]]
"""Pictures, and the sample indices of every device."""


@dataclass(frozen=True)
class World:
    """Data, shards, model and rules of a run.

    `shards[i]` holds the sample indices of device i for training, `held_out[i]` those for its
    personalised accuracy. `client` and `server` are the trained parameters by name, by side;
    `initial` are their values as created, which training in this process does not touch. `short` is
    the tail that reads the front's own tokens, `open` the tokens of the front's output that wait for a
    gradient, `cache` the outputs of a frozen front, if it is one; `plan_flops` counts what plans leave out.
    """

    config: Config
    device: torch.device
    data: DataSet
    shards: tuple[Indices, ...]
    held_out: tuple[Indices, ...]
    backbone: models.Backbone
    cut: Cut
    parts: Parts
    short: Part
    open: slice
    cache: FrontCache | None
    trains: trainable.TrainSet
    client: Mapping[str, torch.nn.Parameter]
    server: Mapping[str, torch.nn.Parameter]
    initial: Tensors
    codecs: Codecs
    flops: StepFlops
    plan_flops: PlanFlops

    @property
    def look(self) -> dict[str, Any]:
        """Keyword arguments of `to_batch` and `evaluate` that the model decides."""
        return {"mean": self.backbone.mean, "std": self.backbone.std, "device": self.device}

    def key(self, *name: int | str) -> int:
        """A named random stream of this run."""
        return key(self.config.seed, *name)

    @cached_property
    def fleet(self) -> tuple[Profile, ...]:
        """The profile of every device: what its rounds cost. Only the server asks."""
        return fleet_of(self.config, len(self.shards))

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """What was worked out of this world before, by whatever name; another world made of it begins anew."""
        return {}

    @property
    def start(self) -> Start:
        """What the batches of a training step hold: images, or kept outputs of the front."""
        return "images" if self.cache is None else self.cache.start

    @property
    def blind(self) -> bool:
        """Whether what the tail reads of the front's own tokens is the same for every image."""
        vit: Any = self.backbone.vit
        return self.short.reads == "tokens" and vit.global_pool == "token" and not self.cut.front + self.cut.tail

    def train(self, mode: bool = True) -> None:
        """Set training or evaluation mode of the whole model."""
        self.parts.train(mode)
        self.short.train(mode)

    def load(self, tensors: Mapping[str, Tensor], into: Mapping[str, nn.Parameter] | None = None) -> None:
        """Put values into the trained parameters of those names, or `into` copies of them."""
        named = {**self.client, **self.server} if into is None else into
        with torch.no_grad():
            for name, value in tensors.items():
                named[name].copy_(value)

    def learning_rate(self, number: int) -> float:
        """The learning rate of round `number`, after schedule and warm-up."""
        settings = self.config.optimizer
        warm = min(1.0, number / settings.warmup) if settings.warmup else 1.0
        factor: float = self.config.piece("optimizer.schedule").factor(number, self.config.rounds)
        return settings.lr * warm * factor

    def link(self, number: int, client: int, tap: Tap | None = None) -> Link:
        """One end of the wire to `client` in round `number`."""
        return Link(self.codecs, number, client, tap, seed=self.key("wire"), most=self._most_values)

    @cached_property
    def _most_values(self) -> int:
        """The values of an activation at most: twice the patches of a batch, and a thousand tokens beside them."""
        vit: Any = self.backbone.vit
        patches = getattr(vit.patch_embed, "num_patches", None)
        if not patches:
            return MOST_VALUES
        return max(64, self.config.local.batch_size) * (2 * int(patches) + 1024) * int(vit.embed_dim)

    def model_state(self) -> Tensors:
        """The whole model by name, on the CPU."""
        return {name: value.detach().cpu() for name, value in self.backbone.vit.state_dict().items()}


def values_of(parameters: Mapping[str, torch.nn.Parameter]) -> Tensors:
    """Copies of the parameters' values, on the CPU."""
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors, by name."""
    return {name: tuple(x.shape) for name, x in tensors.items()}


def world(config: Config) -> World:
    """The world of `config`, built once per process; keys that cannot change a result are left out.

    Raises:
        FedsplitError: whatever is wrong with the config, the data or the model.
    """
    return _world(tuple(sorted((name, value) for name, value in config.values.items() if not is_local(name))))


def is_local(name: str) -> bool:
    """Whether a key says where or how the work is run, and cannot change a result."""
    return name in LOCAL_KEYS or name.startswith(LOCAL_SECTIONS)


@lru_cache(maxsize=1)
def _world(values: tuple[tuple[str, Any], ...]) -> World:
    return _build(resolve(dict(values)), hollow=False)


def ghost(config: Config) -> World:
    """The world of `config` on the meta device: shards and shapes, but no pictures, weights or initial values.

    Raises:
        FedsplitError: as `world`, except for weights and pictures that cannot be had.
    """
    return _build(config, hollow=True)


def halved(config: Config, half: Path, own: Dealt | None = None) -> World:
    """The world of a device: front and tail of the file `half`, and a body on the meta device, without values.

    `own` are the device's own pictures and whose they are; without them it takes its shard of `data.source`.

    Raises:
        FedsplitError: as `world`, or the file does not hold what front and tail of `config` need.
    """
    return _build(config, hollow=False, half=half, own=own)


def _dealt(config: Config, hollow: bool) -> Dealt:
    data = load(config.data, models.input_size(config.model), hollow)
    count = config.devices.count or DEFAULT_DEVICES
    return data, deal(data.train, data.test, data.classes, config.data, count, config.seed)


def _build(config: Config, hollow: bool, half: Path | None = None, own: Dealt | None = None) -> World:
    torch.set_num_threads(config.threads)
    device = torch.device("meta") if hollow else pick_device(config.device)
    data, dealt = own or _dealt(config, hollow)
    halves = [
        hold_out(indices, data.train.labels, config.data.local_test, key(config.seed, "local-test", number))
        for number, indices in enumerate(dealt)
    ]
    settings = replace(config.model, checkpoint=str(half)) if half else config.model
    backbone = models.create(settings, len(data.classes), config.seed, hollow or half is not None)
    cut = address(config, backbone.depth)
    _edit(config, backbone, cut)
    if half:
        models.fill(backbone.vit.to("meta"), half, device)
    else:
        backbone.vit.to(device)
    if config.compile and not hollow:
        _compile(backbone.vit, config.compile)
    pool = pooling(config, backbone.vit, cut)
    parts = split(backbone.vit, cut, pool)
    parts.train()
    trains = trainable.resolve(config.train, backbone.vit, parts)
    sides = by_side(config, parts)
    reads = local_reads(config, backbone.vit, cut)
    start = kept_until(config, parts.front, trains)
    short = shortcut(backbone.vit, cut, parts, reads)
    if half:
        models.check_filled((parts.front, parts.tail, short), half)
    look = {"mean": backbone.mean, "std": backbone.std, "device": device}
    return World(
        config=config,
        device=device,
        data=data,
        shards=tuple(train for train, _ in halves),
        held_out=tuple(test for _, test in halves),
        backbone=backbone,
        cut=cut,
        parts=parts,
        short=short,
        open=opening(parts.front, trains.front),
        cache=None if start == "images" else FrontCache(parts.front, start, config, data.train, look),
        trains=trains,
        client=sides[0],
        server=sides[1],
        initial={} if hollow or half else values_of({**sides[0], **sides[1]}),
        codecs=_codecs(config),
        flops=_flops(config, backbone, (cut, backbone.image_size, pool, reads, start)),
        plan_flops=PlanFlops(backbone.vit, cut, backbone.image_size, config.cut.shape, planned_blocks(config, cut)),
    )


def steered(world: World, choices: str) -> World:
    """`world` with the keys, as JSON, that controllers chose for one client and round: another config, other codecs.

    Data, model and parameters are those of `world`; without choices it is `world`.
    """
    if not choices:
        return world
    made: dict[str, World] = world.memo.setdefault("steered", {})
    if choices not in made:
        if len(made) >= MOST_STEERED:
            made.clear()
        config = resolve({**world.config.values, **json.loads(choices)})
        made[choices] = replace(world, config=config, codecs=_codecs(config))
    return made[choices]


def codecs_for(world: World, choices: str) -> Codecs:
    """The codecs of both ends of a client's wire under the controllers' `choices` for it."""
    return steered(world, choices).codecs


def _codecs(config: Config) -> Codecs:
    return {stream: config.pieces(f"wire.{stream}") for stream in STREAMS}


def _compile(vit: Any, backend: str) -> None:
    """Compile the blocks' own forward pass: plans of whole blocks then know two patterns, run and skipped."""
    known = torch.compiler.list_backends()
    if backend not in (*known, "eager"):
        raise FedsplitError(f"compile='{backend}' is no backend of torch.compile here; known: {', '.join(known)}.")
    for block in vit.blocks:
        block.compiled = torch.compile(block.forward, backend=backend, dynamic=False)


# Keys that decide what a model computes; a study builds many worlds of few models.
_SHAPING = ("model.", "cut.", "front.", "body.", "local.", "train")
_COUNTED: dict[Any, StepFlops] = {}


def _flops(config: Config, backbone: models.Backbone, how: tuple[Any, ...]) -> StepFlops:
    values = tuple(sorted(item for item in config.values.items() if item[0].startswith(_SHAPING)))
    name = (values, cast(Any, backbone.vit).num_classes, shape_of(backbone.vit), how)
    if name not in _COUNTED:
        _COUNTED[name] = step_flops(backbone.vit, *how)
    return _COUNTED[name]


def _edit(config: Config, backbone: models.Backbone, cut: Cut) -> None:
    vit: Any = backbone.vit
    if has_local_head(config):
        torch.manual_seed(key(config.seed, "local_head"))
        vit.local_head = nn.Sequential(nn.LayerNorm(vit.embed_dim), nn.Linear(vit.embed_dim, vit.num_classes))
    for place in ("front.edits", "body.edits"):
        for name, piece in zip(config.names(place), config.pieces(place), strict=True):
            piece.edit(backbone.vit, cut, key(config.seed, place, name))
