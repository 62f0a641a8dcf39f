"""The cost account: what a config computes, holds and sends over a run, without running it.

Every kind of step is taken once, by the code that a run takes it with, on tensors that have shapes and no
values; who takes part, which steps follow and what a device has kept are counted round by round. A run's
own figures agree with it, as long as no client fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fedsplit.client import client_compute, client_share, plan_batches, work
from fedsplit.config import Config
from fedsplit.devices.clock import cost, round_cost
from fedsplit.experiment import check
from fedsplit.front.vit import can_pool_early
from fedsplit.hollow import Hollow, HollowCache, frame_bytes
from fedsplit.local import Choice
from fedsplit.round import sample
from fedsplit.samples import Stock
from fedsplit.types import STREAMS, FedsplitError, Job, Report, Tensors
from fedsplit.wire.link import Link
from fedsplit.world import Indices, World, ghost

SUMS = ("steps", "kept_samples", "local_samples", "scored_samples", "computed_samples", "messages")


@dataclass(frozen=True)
class Account:
    """What a run costs. `bytes` by stream, `counts` (the names of `SUMS`) and `_flops` are sums over all clients
    and rounds, the peaks maxima; `client_rounds` counts pairs of client and round.

    `split_flops` is what split steps alone cost the clients if nothing of the front were kept, `visits` counts
    their samples, a sample as often as a step visits it; `tokens` is (N, C) at the cut; `parameters` counts
    all of them and those trained by side; `keeps` says whether front outputs are kept, `pools` whether the
    body could pool. `estimated` says what is not exact, and why.
    """

    config: Config
    devices: int
    client_rounds: int
    samples: float
    bytes: Mapping[str, int]
    counts: Mapping[str, int]
    client_flops: int
    server_flops: int
    split_flops: int
    client_peak_bytes: int
    server_peak_bytes: int
    client_stored_bytes: int
    virtual_s: float
    energy_j: float
    parameters: Mapping[str, int]
    tokens: tuple[int, int]
    visits: int
    keeps: bool
    pools: bool
    estimated: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all streams, both ways."""
        return sum(self.bytes.values())

    def figures(self) -> dict[str, Any]:
        """The account as plain values, with means a client and round beside the totals."""
        up, down = (sum(v for k, v in self.bytes.items() if k.endswith(way)) for way in ("-up", "-down"))
        streams = {f"bytes_{name.replace('-', '_')}": count for name, count in self.bytes.items()}
        flops = {"client_flops": self.client_flops, "server_flops": self.server_flops}
        sums: dict[str, int] = {**flops, "bytes_up": up, "bytes_down": down, **streams, **self.counts}
        return {
            "name": self.config.name,
            "model": self.config.model.name,
            "devices": self.devices,
            "clients_per_round": self.client_rounds / self.config.rounds,
            "rounds": self.config.rounds,
            "samples_per_client": self.samples,
            "per_client_round": {name: value / self.client_rounds for name, value in sums.items()},
            "total": {**sums, "virtual_s": self.virtual_s, "energy_j": self.energy_j},
            "client_peak_bytes": self.client_peak_bytes,
            "server_peak_bytes": self.server_peak_bytes,
            "client_stored_bytes": self.client_stored_bytes,
            "parameters": dict(self.parameters),
            "estimated": list(self.estimated),
        }


def account(config: Config) -> Account:
    """The account of a run of `config` in which no client fails.

    Raises:
        FedsplitError: whatever is wrong with the config, the data or the model.
    """
    if config.resume:
        raise FedsplitError("resume has nothing to plan; give the run's own config.toml with --config.")
    world = ghost(config)
    check(config, world)
    if world.cache is not None:
        cache = HollowCache(world.cache.front, world.cache.start, config, world.data.train, world.look)
        world = replace(world, cache=cache)
    book = _Book(world)
    total: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    seconds = joules = 0.0
    for number in range(1, config.rounds + 1):
        order = sample(world, number, 0)
        reports = [book.report(number, client) for client in order]
        costs = [cost(report, config.devices) for report in reports]
        whole = round_cost(costs, parallel=config.server.schedule == "splitfed-v1")
        seconds, joules = seconds + whole.seconds, joules + whole.joules
        for client, report in zip(order, reports, strict=True):
            sent.update(report.bytes)
            total["clients"] += 1
            total["samples"] += len(world.shards[client])
            for name in ("client_flops", "server_flops", *SUMS):
                total[name] += book.local if name == "local_samples" else getattr(report, name)
    return _account(book, sent, total, seconds, joules)


def _account(book: _Book, sent: Mapping[str, int], total: Mapping[str, int], seconds: float, joules: float) -> Account:
    world, (client_peak, server_peak) = book.world, book.peaks()
    return Account(
        config=world.config,
        devices=len(world.shards),
        client_rounds=total["clients"],
        samples=total["samples"] / total["clients"],
        bytes={name: sent[name] for name in STREAMS},
        counts={name: total[name] for name in SUMS},
        client_flops=total["client_flops"],
        server_flops=total["server_flops"],
        split_flops=client_share(world)[0] * book.seen,
        client_peak_bytes=client_peak,
        server_peak_bytes=server_peak,
        client_stored_bytes=book.stored,
        virtual_s=seconds,
        energy_j=joules,
        parameters={
            "total": sum(p.numel() for p in world.backbone.vit.parameters()),
            "client": sum(p.numel() for p in world.client.values()),
            "server": sum(p.numel() for p in world.server.values()),
        },
        tokens=book.tokens,
        visits=book.seen,
        keeps=world.cache is not None,
        pools=can_pool_early(world.backbone.vit),
        estimated=tuple(sorted(book.estimated)),
    )


class _Book:
    """Counts one client's round after another, in the order of the run."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.pieces = dict(zip(world.config.names("data.select"), world.config.pieces("data.select"), strict=True))
        self.epochs = sum(phase.epochs for phase in world.config.pieces("local.phases"))
        self.parameters = {
            stream: frame_bytes(world.codecs, stream, dict(world.client))
            for stream in ("parameters-up", "parameters-down")
        }
        self.estimated: set[str] = set()
        self.local = self.seen = self.stored = 0
        self._largest = self._longest = 0
        self._memory: dict[int, Tensors] = {}
        self._held: dict[int, Any] = {}
        self._steps: dict[int, Report] = {}
        self._sizes: dict[int, Counter[int]] = {}

    def report(self, number: int, client: int) -> Report:
        """The figures of `client` in round `number`; `local` is then its count of samples in local steps."""
        world, job = self.world, Job(client, number, 0, b"", b"")
        scored, kept, count = self._choose(job)
        shard = world.shards[client]
        self.local = self.epochs * len(shard)
        sizes = self._batches(job, count)
        seen = sum(size * steps for size, steps in sizes.items())
        computed = self._computed(job, self.epochs + scored, kept, seen)
        if world.cache is not None:
            self.stored = max(self.stored, int(self._held[client].sum()) * world.cache.sample_bytes)
        self.seen += seen
        self._largest = max([self._largest, *sizes])
        self._longest = max(self._longest, min(world.config.local.batch_size, len(shard)))
        sent: Counter[str] = Counter(self.parameters)
        messages = 2
        for size, steps in sizes.items():
            one = self._step(size)
            sent.update({name: steps * length for name, length in one.bytes.items()})
            messages += steps * one.messages
        return Report(
            steps=sum(sizes.values()),
            kept_samples=count,
            scored_samples=scored * len(shard),
            computed_samples=computed,
            bytes=sent,
            messages=messages,
            client_flops=client_compute(world, seen, self.local, scored * len(shard), computed),
            server_flops=client_share(world)[1] * seen,
        )

    def peaks(self) -> tuple[int, int]:
        """Peak bytes at a client and at the server, of the longest batch of either kind of step."""
        phases = self.world.config.local.phases
        reports = [self._probe(self._longest, local__epochs=0, local__phases=phases)]
        if self._largest:
            reports.append(self._step(self._largest))
        limit = self.world.config.front.cache_memory_bytes
        # A probe keeps the front outputs of one batch, a client those of all its samples.
        steps = max(r.client_peak_bytes - min(r.stored_bytes, limit) for r in reports)
        return steps + min(self.stored, limit), max(r.server_peak_bytes for r in reports)

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

    def _batches(self, job: Job, count: int) -> Counter[int]:
        """How many split steps of which batch size `count` kept samples give."""
        if count not in self._sizes:
            steps = plan_batches(self.world, job, np.arange(count))
            self._sizes[count] = Counter(len(indices) for indices, _ in steps)
        return self._sizes[count]

    def _computed(self, job: Job, passes: int, kept: Indices | None, seen: int) -> int:
        """How many visits went through the frozen front: `passes` over all samples, then `seen` of those kept."""
        shard, cache = self.world.shards[job.client], self.world.cache
        if cache is None:
            return passes * len(shard) + seen
        fits = cache.fits(len(shard), job.client)
        held = self._held.setdefault(job.client, np.zeros(len(shard), dtype=bool))
        computed = 0
        for _ in range(passes):
            computed += int((~held).sum())
            held |= fits
        if held.all():
            return computed
        if kept is None:
            if fits.any():
                self.estimated.add("client FLOPs: which of the kept samples have no room for a kept front output")
            return computed + round(seen * float((~fits).mean()))
        for indices, _ in plan_batches(self.world, job, kept):
            places = np.searchsorted(shard, indices)
            computed += int((~held[places]).sum())
            held[places] |= fits[places]
        return computed

    def _step(self, size: int) -> Report:
        if size not in self._steps:
            self._steps[size] = self._probe(size, local__epochs=1, local__phases="")
        return self._steps[size]

    def _probe(self, size: int, **changes: Any) -> Report:
        """A client's round over `size` samples in one batch, taken on shapes; `bytes` are those of its steps."""
        settings = self.world.config.replace(data__select="", eval__per_client=False, local__max_steps=1, **changes)
        small = replace(self.world, config=settings, shards=(np.arange(size),))
        link = Link(self.world.codecs)
        with Hollow():
            report, _, _ = work(small, Job(0, 1, 0, b"", b""), link)
        return replace(report, bytes=dict(link.sizes), messages=link.messages)
