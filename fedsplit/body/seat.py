"""A client's seat at the server: the body's side of its round, from a job to what stays at the server."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedsplit import personal
from fedsplit.body.planner import metrics_in
from fedsplit.body.service import LocalBody
from fedsplit.front.vit import Part
from fedsplit.metrics.memory import weight_bytes
from fedsplit.optim import PartOptimizer
from fedsplit.types import Job, Tensors
from fedsplit.wire.frame import pack, unpack
from fedsplit.wire.link import Tap
from fedsplit.world import World


@dataclass
class Seat:
    """The body of one client's round, with the trained parameters behind it by name.

    In one process all seats are at the world's own body, one round after another. Where clients take their
    steps at the same time each has its `own` copy of what trains, so that none moves a weight between the
    forward and the backward pass of another; what is frozen is one for all.
    """

    world: World
    body: LocalBody
    named: Mapping[str, nn.Parameter]
    watch: personal.Importance | None

    @classmethod
    def take(
        cls,
        world: World,
        job: Job,
        tap: Tap | None = None,
        watch: personal.Importance | None = None,
        own: bool = False,
    ) -> Seat:
        """The seat of `job`'s client, with the server's state that the job holds; `tap` sees what arrives.

        Raises:
            FedsplitError: the state or the notes of the job are no frames.
        """
        settings = world.config
        part, tail = world.parts.body, world.parts.tail if settings.cut.shape == "vanilla" else None
        named: Mapping[str, nn.Parameter] = world.server
        if own:
            part, tail = _copied(world, part, tail)
            found = part.named() | (tail.named() if tail else {})
            named = {name: found[name] for name in world.server}
        state = unpack(job.server)
        world.load(
            {name: value for name, value in state.items() if "|" not in name} | personal.own_at_server(job.notes), named
        )
        pulls = settings.pieces("share.proximal")
        optimizer = PartOptimizer(named, settings.optimizer, world.learning_rate(job.round), pulls, watch)
        optimizer.load({name: value for name, value in state.items() if "|" in name})
        body = LocalBody(
            body=part,
            tail=tail,
            link=world.link(job.round, job.client, tap),
            optimizer=optimizer,
            trains=bool(named),
            client_trains=bool(world.trains.front),
            open=world.open,
            metrics=metrics_in(settings),
            forgets=settings.server.optimizer == "step" and settings.server.schedule != "splitfed-v1",
            alike=not settings.names("body.plans"),
        )
        body.meter.ignore(world.backbone.vit.parameters())
        body.meter.ignore(named.values())
        return cls(world, body, named, watch)

    def leave(self) -> tuple[bytes, bytes]:
        """What `Update` calls `server` and `notes`: what is shared, with moments, and what is the client's own."""
        shared, own = personal.divided(self.world, self.named, self.watch)
        return pack(shared | self._moments()), pack(own)

    @property
    def peak_bytes(self) -> int:
        """Memory of this seat: weights, gradients, the optimiser's state, and what a backward pass waits for."""
        parts = [self.body.body, *([self.body.tail] if self.body.tail else [])]
        weights = weight_bytes(parameter for part in parts for parameter in part.parameters())
        return weights + self.body.optimizer.state_bytes() + self.body.meter.saved_bytes

    def _moments(self) -> Tensors:
        server = self.world.config.server
        keeps = server.schedule != "splitfed-v1" and server.optimizer != "step"
        return self.body.optimizer.state() if keeps else {}


def _copied(world: World, part: Part, tail: Part | None) -> tuple[Part, Part | None]:
    """Copies of both with trained parameters of their own; they share frozen ones with the world's."""
    vit = world.backbone.vit
    kept: dict[int, Any] = {id(tensor): tensor for tensor in vit.parameters() if not tensor.requires_grad}
    return copy.deepcopy((part, tail), kept)
