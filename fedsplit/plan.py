"""The cost account: what a config computes, holds and sends over a run, without running it.

Every kind of step is taken once, by the code that a run takes it with, on tensors that have shapes and no
values (`fedsplit.book`); who takes part, which steps follow and what a device has kept are counted round by
round. A run's own figures agree with it, as long as no client fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedsplit.book import Book
from fedsplit.client import client_share
from fedsplit.config import Config
from fedsplit.control import steer
from fedsplit.devices.clock import cost, round_cost
from fedsplit.experiment import check
from fedsplit.front.vit import can_pool_early
from fedsplit.hollow import HollowCache
from fedsplit.round import sample
from fedsplit.types import STREAMS, FedsplitError
from fedsplit.world import ghost

SUMS = ("steps", "kept_samples", "local_samples", "scored_samples", "computed_samples", "messages")


@dataclass(frozen=True)
class Account:
    """What a run costs. `bytes` by stream (`raw_bytes` without codecs), `counts` (the names of `SUMS`) and
    `_flops` are sums over all clients and rounds, the peaks maxima; `client_rounds` counts pairs of client and round.

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
    raw_bytes: Mapping[str, int]
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
        streams |= {f"bytes_raw_{name.replace('-', '_')}": count for name, count in self.raw_bytes.items()}
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
    book = Book(world)
    total: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    raw: Counter[str] = Counter()
    seconds = joules = 0.0
    control: steer.Memories = {}
    for number in range(1, config.rounds + 1):
        order = sample(world, number, 0)
        choices, control = book.choices(control, number, order)
        reports = [book.report(number, client, choices.get(client, "")) for client in order]
        costs = [cost(report, config.devices) for report in reports]
        whole = round_cost(costs, parallel=config.server.schedule == "splitfed-v1")
        seconds, joules = seconds + whole.seconds, joules + whole.joules
        for client, report in zip(order, reports, strict=True):
            sent.update(report.bytes)
            raw.update(report.raw_bytes)
            total["clients"] += 1
            total["samples"] += len(world.shards[client])
            for name in ("client_flops", "server_flops", *SUMS):
                total[name] += book.local if name == "local_samples" else getattr(report, name)
    return _account(book, (sent, raw), total, seconds, joules)


def _account(
    book: Book, wire: tuple[Counter[str], Counter[str]], total: Mapping[str, int], seconds: float, joules: float
) -> Account:
    world, (client_peak, server_peak) = book.world, book.peaks()
    return Account(
        config=world.config,
        devices=len(world.shards),
        client_rounds=total["clients"],
        samples=total["samples"] / total["clients"],
        bytes={name: wire[0][name] for name in STREAMS},
        raw_bytes={name: wire[1][name] for name in STREAMS},
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
