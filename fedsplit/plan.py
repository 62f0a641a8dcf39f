"""The cost account: what a config computes, holds and sends over a run, without running it.

Every kind of step is taken once, by the code that a run takes it with, on tensors that have shapes and no
values (`fedsplit.book`); who takes part, which steps follow and what a device has kept are counted round by
round. A run's own figures agree with it, as long as no client fails; those that drop out, straggle or come too
late by the virtual clock are drawn as in the run.
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
from fedsplit.devices import fit
from fedsplit.devices.cohort import gather, settle
from fedsplit.experiment import check
from fedsplit.front.vit import can_pool_early
from fedsplit.hollow import HollowCache
from fedsplit.round import quorum
from fedsplit.types import STREAMS, FedsplitError
from fedsplit.world import ghost

Wire = tuple[Counter[str], Counter[str]]  # bytes by stream, coded and not
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
            "per_client_round": {name: value / max(1, self.client_rounds) for name, value in sums.items()},
            "total": {**sums, "virtual_s": self.virtual_s, "energy_j": self.energy_j},
            "client_peak_bytes": self.client_peak_bytes,
            "server_peak_bytes": self.server_peak_bytes,
            "client_stored_bytes": self.client_stored_bytes,
            "parameters": dict(self.parameters),
            "estimated": list(self.estimated),
        }


def account(config: Config, *, fits: bool = True) -> Account:
    """The account of a run of `config` in which no client fails but those that drop out by the virtual clock.

    A device that cannot hold its part is refused; not so where `fits` is false, as for what a cost is compared with.

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
    if fits:
        fit.check(world)
    book = Book(world)
    total: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    raw: Counter[str] = Counter()
    spent = [0.0, 0.0, 0.0]
    control: steer.Memories = {}
    for number in range(1, config.rounds + 1):
        after = _round(book, number, control, (sent, raw), total, spent)
        if after is None:
            book.estimated.add(f"the run: it stops in round {number}, where too few clients stay or come in time")
            break
        control = after
    return _account(book, (sent, raw), total, *spent[:2])


def _round(
    book: Book, number: int, control: steer.Memories, wire: Wire, total: Counter[str], spent: list[float]
) -> steer.Memories | None:
    """Add a round to the sums, and to seconds, joules and the clock.

    Returns:
        What the controllers remember after it; None where all its attempts fall short.
    """
    world = book.world
    share = world.config.share
    seconds, joules, clock_s = 0.0, 0.0, spent[2]
    for attempt in range(share.attempts):
        cohort = gather(world, number, attempt, clock_s)
        choices, after = book.choices(control, number, cohort.clients)
        reports, local = {}, {}
        for client in cohort.clients:
            reports[client], local[client] = book.report(number, client, choices.get(client, "")), book.local
        settled = settle(world, cohort, reports)
        seconds, joules = seconds + settled.whole.seconds, joules + settled.whole.joules
        clock_s += settled.whole.seconds
        enough = len(settled.costs) >= quorum(world, cohort)
        for client in [lost.client for lost in settled.lost] if enough else list(reports):
            book.undo(client)
        if enough or share.below_quorum == "stop":
            break
    spent[:] = spent[0] + seconds, spent[1] + joules, clock_s
    if not enough:
        return None
    for client in settled.costs:
        total["clients"] += 1
        total["samples"] += len(world.shards[client])
        for name in SUMS:
            total[name] += local[client] if name == "local_samples" else getattr(reports[client], name)
    for report in [reports[client] for client in settled.costs] + [lost.report for lost in settled.lost]:
        wire[0].update(report.bytes)
        wire[1].update(report.raw_bytes)
        total.update(client_flops=report.client_flops, server_flops=report.server_flops)
    return book.attended(after, number, settled.costs)


def _account(book: Book, wire: Wire, total: Mapping[str, int], seconds: float, joules: float) -> Account:
    world, (client_peak, server_peak) = book.world, book.peaks()
    return Account(
        config=world.config,
        devices=len(world.shards),
        client_rounds=total["clients"],
        samples=total["samples"] / max(1, total["clients"]),
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
