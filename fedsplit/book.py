"""What one client's round after another computes, holds and sends: the book behind the account of `fedsplit.plan`.

Steps of a kind cost the same, so each kind is taken once, on tensors that have shapes and no values; how many
of them follow, and what a device has kept, is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fedsplit.body.planner import Planner
from fedsplit.body.seat import Seat
from fedsplit.body.tally import Tally
from fedsplit.client import client_compute, client_share, plan_batches, work
from fedsplit.control import steer
from fedsplit.hollow import Hollow, frame_bytes
from fedsplit.local import Choice
from fedsplit.personal import foreseen, withheld
from fedsplit.samples import Stock
from fedsplit.types import ORDINARY, Job, Op, Order, Report, Tensors
from fedsplit.wire.chain import of_shapes_alone
from fedsplit.wire.codec import PARAMETERS, Codecs, squeezes
from fedsplit.world import Indices, World, steered

# Steps that are taken on shapes for the peaks of plans that change from step to step: moments gather in turn.
MOST_STEPS = 16
BATCH = "local.batch-size"


class Book:
    """Counts one client's round after another, in the order of the run.

    After a round `local` is its number of samples in local steps. `seen` counts the samples of all split steps,
    `stored` is the most bytes of front outputs that a device keeps, `estimated` says what is not exact, and why.
    """

    def __init__(self, world: World) -> None:
        self.estimated = {
            f"bytes of {stream}: left out is what {type(stages[-1]).__name__.lower()} saves, since values decide it"
            for stream, stages in world.codecs.items()
            if stages and squeezes(stages[-1])
        }
        self.world = world = replace(world, codecs=of_shapes_alone(world.codecs))
        self.pieces = dict(zip(world.config.names("data.select"), world.config.pieces("data.select"), strict=True))
        self.epochs = sum(phase.epochs for phase in world.config.pieces("local.phases"))
        self._parameters: dict[Any, dict[str, tuple[int, int]]] = {}
        own = withheld(world, world.client)
        self.whole: Tensors = dict(world.client)
        self.shared = {name: value for name, value in self.whole.items() if name not in own}
        self.raw = self._coded({})
        if not foreseen(world):
            self.estimated.add("bytes of parameters: gradients decide which blocks a client shares")
        self._met: set[int] = set()
        self.local = self.seen = self.stored = 0
        self._largest = self._longest = self._load = 0
        self._busiest: tuple[int, list[Order]] | None = None
        self._scores: dict[int, Tensors] = {}
        self._memory: dict[int, Tensors] = {}
        self._held: dict[int, Any] = {}
        self._before: dict[int, tuple[Any, ...]] = {}
        self._peaks: dict[int, int] = {}
        self._steps: dict[Any, Report] = {}
        self._sizes: dict[Any, Counter[int]] = {}

    def _coded(self, codecs: Codecs) -> dict[str, tuple[int, int]]:
        """Of both streams of parameters, the bytes of a client's first round and of its later ones."""
        name = tuple(tuple(codecs.get(stream, ())) for stream in PARAMETERS)
        if name not in self._parameters:
            (up, down), shared = PARAMETERS, self.shared
            self._parameters[name] = {
                up: (frame_bytes(codecs, up, shared), frame_bytes(codecs, up, shared, again=True)),
                down: (frame_bytes(codecs, down, self.whole), frame_bytes(codecs, down, shared, again=True)),
            }
        return self._parameters[name]

    def choices(
        self, memories: steer.Memories, number: int, order: Sequence[int]
    ) -> tuple[dict[int, str], steer.Memories]:
        """What controllers choose for the clients of a round, and their memories after it.

        What is learnt from accuracy cannot be known: such a controller leaves the keys as they are.
        """
        return steer.propose(self._steering, memories, number, order)

    def attended(self, memories: steer.Memories, number: int, clients: Iterable[int]) -> steer.Memories:
        """The memories after a round in which the updates of `clients` count."""
        return steer.attended(self._steering.config, memories, number, clients)

    def report(self, number: int, client: int, choices: str = "") -> Report:
        """The figures of `client` in round `number`; `local` is then its count of samples in local steps.

        `choices` are what controllers chose for it.
        """
        before = self._kept(client)
        world, job = self._steered(choices), Job(client, number, 0, b"", b"")
        scored, kept, count = self._choose(job)
        shard = world.shards[client]
        self.local = self.epochs * len(shard)
        tally = Tally(world)
        sizes = self._steps_of(world, job, kept, count, tally)
        seen = sum(size * steps for (size, _), steps in sizes.items())
        early, computed = self._computed(world, job, self.epochs + scored, kept, seen)
        if world.cache is not None:
            self.stored = max(self.stored, int(self._held[client].sum()) * world.cache.sample_bytes)
        self.seen += seen
        self._before[client] = (seen, *before)
        self._longest = max(self._longest, min(world.config.local.batch_size, len(shard)))
        again = client in self._met
        self._met.add(client)
        sent: Counter[str] = Counter({name: once[again] for name, once in self._coded(world.codecs).items()})
        raw: Counter[str] = Counter({name: once[again] for name, once in self.raw.items()})
        messages = 2
        for (size, order), steps in sizes.items():
            one = self._step(world, size, order)
            sent.update({name: steps * length for name, length in one.bytes.items()})
            raw.update({name: steps * length for name, length in one.raw_bytes.items()})
            messages += steps * one.messages
        report = Report(
            steps=sum(sizes.values()),
            kept_samples=count,
            scored_samples=scored * len(shard),
            computed_samples=computed,
            bytes=sent,
            raw_bytes=raw,
            messages=messages,
            **client_compute(world, seen, self.local, scored * len(shard), computed, early),
            server_flops=client_share(world)[1] * seen,
        )
        return replace(report, **tally.figures(report))

    def undo(self, client: int) -> None:
        """The last round of `client` did not count: it keeps nothing of it."""
        added, met, *kept = self._before.pop(client)
        self.seen -= added
        (self._met.add if met else self._met.discard)(client)
        for place, value in zip((self._memory, self._held, self._scores), kept, strict=True):
            place.pop(client, None)
            if value is not None:
                place[client] = value

    def _kept(self, client: int) -> tuple[Any, ...]:
        """Whether the client took part before, and copies of what is known of it."""
        return client in self._met, *(copy(place.get(client)) for place in (self._memory, self._held, self._scores))

    def peaks(self) -> tuple[int, int]:
        """Peak bytes at a client and at the server, of the longest batch of either kind of step."""
        phases = self.world.config.local.phases
        reports = [self._probe(self._longest, [ORDINARY], local__epochs=0, local__phases=phases)]
        if self._busiest is not None:
            samples, orders = self._busiest
            many: dict[str, Any] = {"local__epochs": 1, "local__max_steps": len(orders), "local__phases": ""}
            reports.append(self._probe(samples, orders, **many))
        elif self._largest:
            reports.append(self._step(self.world, self._largest, ORDINARY))
        limit = self.world.config.front.cache_memory_bytes
        # A probe keeps the front outputs of one batch, a client those of all its samples.
        steps = max(r.client_peak_bytes - min(r.stored_bytes, limit) for r in reports)
        return steps + min(self.stored, limit), max(r.server_peak_bytes for r in reports)

    def _steered(self, choices: str) -> World:
        if not choices:
            return self.world
        world = steered(self.world, choices)
        return replace(world, codecs=of_shapes_alone(world.codecs))

    @cached_property
    def _steering(self) -> World:
        """The world with those controllers alone that do not learn."""
        config = self.world.config
        names = (name for name, piece in steer.controllers(config).items() if hasattr(piece, "assign"))
        return replace(self.world, config=config.replace(control__tune=",".join(names)))

    def client_peak(self, client: int) -> int:
        """Peak bytes at a client in its longest step, of either kind; what it keeps of the front not counted."""
        size = min(self._largest_batch(client), len(self.world.shards[client]))
        if size not in self._peaks:
            phases, limit = self.world.config.local.phases, self.world.config.front.cache_memory_bytes
            reports = [self._step(self.world, size, ORDINARY)] if self.world.config.local.epochs or not phases else []
            if phases:
                reports.append(self._probe(size, [ORDINARY], local__epochs=0, local__phases=phases))
            self._peaks[size] = max(r.client_peak_bytes - min(r.stored_bytes, limit) for r in reports)
        return self._peaks[size]

    def kept_bytes(self, client: int) -> int:
        """Bytes of front outputs that a client may come to keep."""
        cache, shard = self.world.cache, self.world.shards[client]
        return 0 if cache is None else int(cache.fits(len(shard), client).sum()) * cache.sample_bytes

    def _largest_batch(self, client: int) -> int:
        """The most samples of a step that the config, or a controller, may give a client."""
        largest = self.world.config.local.batch_size
        for piece in steer.controllers(self.world.config).values():
            kind = self.world.fleet[client].name
            choices = [piece.kinds.get(kind, {})] if hasattr(piece, "placed") else piece.choices
            largest = max([int(choice[BATCH]) for choice in choices if BATCH in choice], default=largest)
        return largest

    @cached_property
    def tokens(self) -> tuple[int, int]:
        """Tokens and channels of an activation at the cut."""
        size = self.world.backbone.image_size
        with torch.no_grad():
            _, tokens, channels = self.world.parts.front(torch.empty(1, 3, size, size, device="meta")).shape
        return tokens, channels

    def _choose(self, job: Job) -> tuple[int, Indices | None, int]:
        """How often all samples are scored, which are kept if that can be known, and how many."""
        memory = self._memory.setdefault(job.client, {})
        if not any(piece.scores_model for piece in self.pieces.values()):
            choice = Choice(self.world, job, Stock(self.world, job, {}), memory)
            kept = choice.kept()
            self._memory[job.client] = choice.memory
            return 0, kept, len(kept)
        shard = self.world.shards[job.client]
        labels = torch.from_numpy(self.world.data.train.labels[shard])
        fresh = {name: piece for name, piece in self.pieces.items() if name not in memory}
        rated = max((piece.epochs for piece in fresh.values() if piece.scores_model), default=0)
        memory |= {name: labels for name, piece in fresh.items() if piece.once}
        count = min(piece.count(labels) for piece in self.pieces.values())
        if len(self.pieces) > 1 and count < len(shard):
            self.estimated.add("kept samples: at most, since several selectors are combined by 'and'")
        return min(rated, max(1, self.epochs)), shard if count == len(shard) else None, count

    def _batches(self, world: World, job: Job, count: int) -> Counter[int]:
        """How many split steps of which batch size `count` kept samples give."""
        local = world.config.local
        name = (count, local.batch_size, local.max_steps)
        if name not in self._sizes:
            steps = plan_batches(world, job, np.arange(count))
            self._sizes[name] = Counter(len(indices) for indices, _ in steps)
        return self._sizes[name]

    def _steps_of(
        self, world: World, job: Job, kept: Indices | None, count: int, tally: Tally
    ) -> Counter[tuple[int, Order]]:
        """How many split steps of which batch size and kind `count` kept samples give; `tally` counts their plans."""
        if not world.config.names("body.plans"):
            alike = Counter({(size, ORDINARY): steps for size, steps in self._batches(world, job, count).items()})
            self._largest = max([self._largest, *(size for size, _ in alike)])
            return alike
        shard = world.shards[job.client]
        batches = [indices for indices, _ in plan_batches(world, job, shard[:count] if kept is None else kept)]
        planner = Planner(world, job, self._scores.get(job.client, {}))
        if planner.metrics:
            self.estimated.add("server FLOPs, peak and plans: scores decide which units run")
        if steer.learns(self.world.config):
            self.estimated.add("server FLOPs, peak and plans: controllers decide which units run")
        sizes: Counter[tuple[int, Order]] = Counter()
        orders = planner.orders(batches)
        for step, (indices, order) in enumerate(zip(batches, orders, strict=True)):
            planner.record(indices, order, {metric: torch.zeros(planner.shape) for metric in planner.metrics})
            tally.count(order, len(indices))
            load = (world.flops.total - sum(world.plan_flops.spared(order.plan))) * len(indices)
            if load > self._load:
                first = max(0, min(step, len(batches) - MOST_STEPS))
                chosen = slice(first, first + MOST_STEPS)
                samples = min(len(shard), sum(map(len, batches[chosen])))
                self._load, self._busiest = load, (samples, orders[chosen])
            sizes[(len(indices), _like(order))] += 1
        self._scores[job.client] = planner.memory()
        return sizes

    def _computed(self, world: World, job: Job, passes: int, kept: Indices | None, seen: int) -> tuple[int, int]:
        """How many visits went through the frozen front in `passes` over all samples, and with `seen` of those kept."""
        shard, cache = world.shards[job.client], world.cache
        if cache is None:
            return passes * len(shard), passes * len(shard) + seen
        fits = cache.fits(len(shard), job.client)
        held = self._held.setdefault(job.client, np.zeros(len(shard), dtype=bool))
        computed = 0
        for _ in range(passes):
            computed += int((~held).sum())
            held |= fits
        early = computed
        if held.all():
            return early, computed
        if kept is None:
            if fits.any():
                self.estimated.add("client FLOPs: which of the kept samples have no room for a kept front output")
            return early, computed + round(seen * float((~fits).mean()))
        for indices, _ in plan_batches(world, job, kept):
            places = np.searchsorted(shard, indices)
            computed += int((~held[places]).sum())
            held[places] |= fits[places]
        return early, computed

    def _step(self, world: World, size: int, order: Order) -> Report:
        codecs = tuple(tuple(stages) for stream, stages in world.codecs.items() if stream not in PARAMETERS)
        name = (size, order, codecs)
        if name not in self._steps:
            self._steps[name] = self._probe(size, [order], world.codecs, local__epochs=1, local__phases="")
        return self._steps[name]

    def _probe(self, samples: int, orders: Sequence[Order], codecs: Codecs | None = None, **changes: Any) -> Report:
        """A client's round over so many samples, one step by default, on shapes; `bytes` are those of its steps."""
        codecs = self.world.codecs if codecs is None else codecs
        off: dict[str, Any] = {"data__select": "", "eval__per_client": False, "body__cosine": False}
        settings = self.world.config.replace(**(off | {"local__max_steps": 1} | changes))
        # A step of any size that a controller chose is one step here.
        settings = settings.replace(local__batch_size=max(settings.local.batch_size, samples // max(1, len(orders))))
        small = replace(self.world, config=settings, codecs=codecs, shards=(np.arange(samples),))
        link = small.link(1, 0)
        job = Job(0, 1, 0, b"", b"")
        with Hollow():
            seat = Seat.take(small, job)
            report, _ = work(small, job, link, seat.body, orders=orders)
            peak = seat.peak_bytes
        return replace(
            report, server_peak_bytes=peak, bytes=dict(link.sizes), raw_bytes=dict(link.raw), messages=link.messages
        )


def _like(order: Order) -> Order:
    """An order of as many bytes, the same for all of them."""
    plan = order.plan and replace(order.plan, ops=tuple((int(Op.FULL),) * len(row) for row in order.plan.ops))
    return Order(plan and replace(plan, scale=(1.0,) * len(plan.scale)), order.probe)
