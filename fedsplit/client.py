"""What a device does with one message: a client's round."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch

from fedsplit import personal
from fedsplit.body.planner import Planner
from fedsplit.body.seat import Seat
from fedsplit.body.tally import Tally
from fedsplit.data.batches import batches
from fedsplit.local import Alone, work_alone
from fedsplit.metrics.memory import weight_bytes
from fedsplit.optim import PartOptimizer, Watch
from fedsplit.samples import Stock
from fedsplit.step import Body, Client, local_step, u_shape_step, vanilla_step
from fedsplit.types import Batch, Job, Order, Report, Tensors, Update
from fedsplit.wire.frame import pack, unpack
from fedsplit.wire.link import Link, Tap
from fedsplit.world import Indices, World, shapes_of, steered


def client_round(world: World, job: Job, tap: Tap | None = None) -> Update:
    """A client's whole round in one process: the device's side, and the server's in an object that sees only bytes.

    Pure: the update depends on the world and the job alone; what controllers chose for this client (`job.choices`)
    stands in the place of the config's own keys, at both ends of the wire. `tap` sees what the server received.
    """
    seen = personal.watches(world)
    seat = Seat.take(steered(world, job.choices), job, tap, seen[1])
    update = device_round(world, job, seat.body, seen[0])
    server, notes = seat.leave()
    report = replace(update.report, server_peak_bytes=seat.peak_bytes)
    return replace(update, server=server, notes=notes, report=report)


def device_round(world: World, job: Job, body: Body, watch: personal.Importance | None = None) -> Update:
    """The device's side: receive, work alone, train through `body` for the local epochs, send back.

    `watch` sees what the client's optimisers are given. What the server keeps is not in the update.
    """
    start = time.perf_counter()
    world = steered(world, job.choices)
    link = world.link(job.round, job.client)
    link.recall(unpack(job.memory))
    received = link.decode("parameters-down", job.down, shapes_of(world.client))
    personal.receive(world, received, job.memory)
    link.hold("parameters-up", received)
    del received  # a whole copy of what trains here, which the steps have no use for
    report, memory = work(world, job, link, body, watch)
    shared, own = personal.divided(world, world.client, watch)
    up = link.encode("parameters-up", shared)
    link.hold("parameters-down", shared)
    memory |= link.kept()
    memory |= {f"{personal.OWN}{name}": value for name, value in own.items()}
    report = replace(report, bytes=dict(link.sizes), raw_bytes=dict(link.raw), messages=link.messages)
    report = replace(report, wall_s=time.perf_counter() - start)
    return Update(job.client, len(world.shards[job.client]), up, b"", report, pack(memory))


def work(
    world: World,
    job: Job,
    link: Link,
    body: Body,
    watch: Watch | None = None,
    orders: Sequence[Order] = (),
) -> tuple[Report, Tensors]:
    """A client's round from what it received to what it sends back, over `link` to `body`.

    `watch` sees what the client's optimisers are given. The steps are taken by `orders` in turn, if there are
    any, and else by the plans of the config.

    Returns:
        Its figures, those of the server's memory apart, and what the client writes down for itself.
    """
    client = _client(world, link, world.learning_rate(job.round), watch)
    memory = unpack(job.memory)
    stock = Stock(world, job, memory)
    alone = work_alone(world, job, client, stock, world.learning_rate(job.round), memory)
    early = stock.computed
    steps = list(plan_batches(world, job, alone.kept))
    planner = Planner(world, job, memory)
    client.metrics = planner.metrics
    tally = Tally(world)
    loss, seen = 0.0, 0
    planned = cycle(orders) if orders else planner.orders([indices for indices, _ in steps])
    for number, ((indices, stream), order) in enumerate(zip(steps, planned, strict=not orders)):
        batch = stock.batch(indices, stream)
        noise = world.key("noise", job.round, job.client, number)
        tally.add(order, batch, noise)
        loss += _step(world, client, body, batch, noise, order) * len(batch.y)
        planner.record(indices, order, client.heard)
        client.meter.turn() if planner.pieces else client.meter.close()
        seen += len(batch.y)
    report = _measured(world, job, client, seen, alone, stock, early)
    report = replace(
        report,
        **tally.figures(report),
        steps=len(steps),
        workload_variance=planner.variance,
        kept_samples=len(alone.kept),
        train_loss=loss / max(1, seen),
        local_steps=alone.steps,
        local_loss=alone.loss,
        local_accuracy=alone.accuracy,
        scored_samples=alone.scored,
        computed_samples=stock.computed,
    )
    return report, {**alone.memory, **stock.memory(), **planner.memory()}


def client_share(world: World) -> tuple[int, int]:
    """FLOPs of a sample's training step at the client and at the server."""
    flops = world.flops
    client = flops.front + (0 if world.config.cut.shape == "vanilla" else flops.tail)
    return client, flops.total - client


def _client(world: World, link: Link, lr: float, watch: Watch | None) -> Client:
    settings = world.config
    client = Client(
        front=world.parts.front,
        tail=world.parts.tail,
        link=link,
        optimizer=PartOptimizer(world.client, settings.optimizer, lr, settings.pieces("share.proximal"), watch),
        front_trains=bool(world.trains.front),
        body_trains=bool(world.trains.body),
        penalties=settings.pieces("front.penalties"),
        start=world.start,
        open=world.open,
    )
    client.meter.ignore(world.backbone.vit.parameters())
    return client


def plan_batches(world: World, job: Job, kept: Indices) -> Iterator[tuple[Indices, int]]:
    """The batches (B,) of the split steps over the samples `kept`, each with its augmentation stream."""
    settings = world.config
    left = settings.local.max_steps or math.inf
    for epoch in range(settings.local.epochs):
        order = world.key("batches", job.round, job.client, epoch)
        for step, indices in enumerate(batches(kept, settings.local.batch_size, order)):
            if left <= 0:
                return
            left -= 1
            yield indices, world.key("augment", job.round, job.client, epoch, step)


def _step(world: World, client: Client, body: Body, batch: Batch, noise: int, order: Order) -> float:
    if world.config.cut.shape == "none":
        return local_step(client, batch, noise, order)
    step = vanilla_step if world.config.cut.shape == "vanilla" else u_shape_step
    return step(client, body, batch, noise, order)


def client_compute(world: World, seen: int, alone: int, scored: int, computed: int, early: int) -> dict[str, Any]:
    """FLOPs at the client, as in its report: `seen` samples in split steps, `alone` in local ones, `scored` looked at.

    Of all these, `computed` went through the frozen part of the front, `early` of them before the split steps;
    the others were kept. A frozen front only goes forward.
    """
    flops = world.flops
    frozen = flops.kept if world.trains.front else flops.front
    kept = flops.kept * (alone + scored - early)
    later = flops.kept * (seen - (computed - early))
    local = flops.local * alone + flops.score * scored - kept
    forward = frozen * alone + flops.score * scored - kept
    return {
        "client_flops": client_share(world)[0] * seen - later + local,
        "client_infer_flops": frozen * seen - later + forward,
        "local_flops": local,
        "local_infer_flops": forward,
    }


def _measured(world: World, job: Job, client: Client, seen: int, alone: Alone, stock: Stock, early: int) -> Report:
    """Compute and memory of a round of `seen` samples, and its personalised accuracy if that is asked for."""
    tested = len(world.held_out[job.client]) if world.config.eval.per_client else 0
    return Report(
        **client_compute(world, seen, alone.seen, alone.scored, stock.computed, early),
        server_flops=client_share(world)[1] * seen,
        client_peak_bytes=_weights([client.front, *([] if world.config.cut.shape == "vanilla" else [client.tail])])
        + max(alone.step_bytes, client.optimizer.state_bytes() + client.meter.saved_bytes)
        + min(stock.stored_bytes, world.config.front.cache_memory_bytes),
        stored_bytes=stock.stored_bytes,
        personal_accuracy=personal.accuracy(world, job.client) if tested else None,
        personal_samples=tested,
    )


def _weights(parts: Sequence[torch.nn.Module]) -> int:
    return weight_bytes(parameter for part in parts for parameter in part.parameters())
