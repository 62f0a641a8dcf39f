"""What a client does before it talks to the server: it trains on its own, then chooses its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedsplit.data.batches import batches
from fedsplit.metrics.memory import Meter
from fedsplit.optim import PartOptimizer
from fedsplit.samples import Stock, View
from fedsplit.step import Client, local_step
from fedsplit.types import FedsplitError, Job, Tensors
from fedsplit.world import Indices, World


@dataclass
class Alone:
    """How it went: the samples kept for the split steps, and figures for the client's report."""

    kept: Indices
    memory: Tensors
    steps: int = 0
    seen: int = 0
    scored: int = 0
    loss: float | None = None
    accuracy: float | None = None
    step_bytes: int = 0


def work_alone(world: World, job: Job, client: Client, stock: Stock, lr: float, memory: Tensors) -> Alone:
    """The phases of `local.phases` in order, then the choice of `data.select` by the scores they leave.

    Nothing crosses the wire. `memory` is what the client wrote down in its last round.
    """
    choice = Choice(world, job, stock, memory)
    done = Alone(stock.shard, {})
    phases = world.config.pieces("local.phases")
    settings = world.config.optimizer
    pulls = world.config.pieces("share.proximal")
    watch = client.optimizer.watch
    optimizers = [PartOptimizer(world.client, settings, lr * phase.rate, pulls, watch) for phase in phases]
    left = sum(phase.epochs for phase in phases)
    for name, phase, optimizer in zip(world.config.names("local.phases"), phases, optimizers, strict=True):
        solo = replace(client, tail=world.short, optimizer=optimizer, criterion=phase.loss, memory={}, meter=Meter())
        solo.meter.ignore(world.backbone.vit.parameters())
        for epoch in range(phase.epochs):
            done.loss = _epoch(world, job, solo, stock, ("local", name, job.round, job.client, epoch), done)
            left -= 1
            choice.hear(left)
        done.step_bytes = max(done.step_bytes, solo.meter.saved_bytes + optimizer.state_bytes())
    done.kept = choice.kept()
    done.scored, done.accuracy, done.memory = choice.scored, choice.accuracy, choice.memory
    return done


def _epoch(world: World, job: Job, solo: Client, stock: Stock, name: Sequence[int | str], done: Alone) -> float:
    total = 0.0
    for step, indices in enumerate(batches(stock.shard, world.config.local.batch_size, world.key("batches", *name))):
        batch = stock.batch(indices, world.key("augment", *name, step))
        total += local_step(solo, batch, world.key("noise", *name, step)) * len(indices)
        solo.meter.close()
        done.steps, done.seen = done.steps + 1, done.seen + len(indices)
    return total / max(1, len(stock.shard))


def check(world: World) -> None:
    """Whether the client can work alone as the config asks.

    Raises:
        FedsplitError: no body to leave out, no tail at the client, a tail that cannot see the image, tokens
            that only the server can widen, or nothing at the client that trains.
    """
    config = world.config
    phases = [phase for phase in config.pieces("local.phases") if phase.epochs]
    scorers = [piece for piece in config.pieces("data.select") if piece.scores_model and piece.keep < 1]
    auxiliary = world.short.reads == "local_head"
    if phases and config.cut.shape == "none":
        raise FedsplitError(
            "local.phases leaves out the body, but with cut.shape=none there is none after the last block; "
            "set cut.shape=u-shape, or local.epochs for more passes."
        )
    if (phases or scorers) and config.cut.shape == "vanilla":
        key = "local.phases" if phases else "data.select"
        raise FedsplitError(
            f"{key} needs the classifier at the client, but cut.shape=vanilla gives it to the server; "
            "set cut.shape=u-shape."
        )
    if (phases or scorers) and world.blind:
        raise FedsplitError(
            "local.head=tail: without the body the class token has met no image at this cut; set local.head=auto."
        )
    if (phases or scorers) and any(name.startswith("unguard.") for name in world.server):
        raise FedsplitError(
            f"front.bottleneck: train='{config.train}' trains the server's half, which the client needs to read its "
            f"own tokens for {'local.phases' if phases else 'data.select'}; name what trains without 'all' and 'body'."
        )
    if phases and not world.client:
        raise FedsplitError(f"local.phases: train='{config.train}' names nothing at the client; add 'tail'.")
    if auxiliary and not any(name.startswith("local_head.") for name in world.client):
        raise FedsplitError(f"local.head=auxiliary: train='{config.train}' leaves the head out; add 'head' or 'tail'.")


class Choice:
    """The selectors of a client's round: they score while the local phase goes on, then choose.

    A piece's score is averaged over the ends of its last `epochs` local epochs; with `once` the client's
    first choice stands for the whole run. Several selectors combine by 'and', or, where nothing would
    be left, by 'or'. One that keeps all needs no scores.
    """

    def __init__(self, world: World, job: Job, stock: Stock, memory: Tensors) -> None:
        names = world.config.names("data.select")
        self.pieces: dict[str, Any] = dict(zip(names, world.config.pieces("data.select"), strict=True))
        self.world, self.job, self.stock = world, job, stock
        self.memory = {_slot(name): memory[_slot(name)] for name in names if _slot(name) in memory}
        self.scores: dict[str, list[Tensor]] = {name: [] for name in names}
        self.scored = 0
        self.accuracy: float | None = None

    def hear(self, left: int) -> None:
        """An epoch has ended, and `left` are to come: score where that epoch counts."""
        view = View(self.stock)
        for name, piece in self.pieces.items():
            if left < piece.epochs and piece.keep < 1 and _slot(name) not in self.memory:
                self.scores[name].append(piece.score(view))
        if view.scored:
            self.scored += view.scored
            self.accuracy = float((view.logits().argmax(1) == view.labels).float().mean())

    def kept(self) -> Indices:
        """The samples that all selectors keep."""
        if not any(self.scores.values()):  # no epoch was scored
            self.hear(0)
        masks = [self._mask(name) for name in self.pieces]
        mask = torch.ones(len(self.stock.shard), dtype=torch.bool)
        for other in masks:
            mask = mask & other
        if not mask.any():
            mask = torch.stack(masks).any(0)
        kept: Indices = self.stock.shard[mask.numpy()]
        return kept

    def _mask(self, name: str) -> Tensor:
        piece = self.pieces[name]
        if _slot(name) in self.memory:
            return self.memory[_slot(name)].bool()
        stream = self.world.key("select", name, self.job.round, self.job.client)
        heard = self.scores[name] or [torch.zeros(len(self.stock.shard))]
        scores = torch.stack(heard).mean(0)
        labels = torch.from_numpy(self.world.data.train.labels[self.stock.shard])
        mask: Tensor = piece.select(scores, labels, stream)
        if piece.once:
            self.memory[_slot(name)] = mask.to(torch.uint8)
        return mask


def _slot(name: str) -> str:
    return f"chosen|{name}"
