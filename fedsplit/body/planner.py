"""From the pieces of `body.plans` to what every step of a client's round runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsplit.body.ask import Ask
from fedsplit.config import Config
from fedsplit.layout import planned_blocks
from fedsplit.types import ORDINARY, FedsplitError, Job, Op, Order, Plan, Tensors
from fedsplit.world import Indices, World

SCORED = "scored"


class Planner:
    """A client's plans of one round, and what is known of its samples for those of the next.

    The pieces' tables combine by element-wise minimum, their scales by product; what is then in full is no
    plan at all. A metric that needs gradients is taken in the first steps of a round in which scores are
    due, which run in full; a sample has the scores of the step that it was in, a step the mean of those
    of its samples.
    """

    def __init__(self, world: World, job: Job, memory: Tensors) -> None:
        config = world.config
        self.world, self.job = world, job
        self.pieces: dict[str, Any] = dict(zip(config.names("body.plans"), config.pieces("body.plans"), strict=True))
        self.metrics = metrics_in(config)
        self.shape = (world.cut.depth, world.plan_flops.units) if self.pieces else (0, 0)
        self.shard = world.shards[job.client]
        self.variance: float | None = None
        self._known = {name: memory[_slot(name)] for name in self.metrics if _slot(name) in memory}
        self._scored = int(memory[SCORED]) if SCORED in memory else 0

    def orders(self, batches: Sequence[Indices]) -> list[Order]:
        """What each of the steps over `batches` runs."""
        if not self.pieces or not batches:
            return [ORDINARY] * len(batches)
        ask = ask_for(self.world, [len(indices) for indices in batches], self.job.round, self._scores(batches))
        due = self.metrics and self._due()
        probes = max((piece.probes(ask) for piece in self.pieces.values() if metrics_of(piece)), default=0)
        ask = replace(ask, probes=probes if due else 0)
        ops, scale = self._tables(ask)
        for piece in self.pieces.values():
            if hasattr(piece, "loads"):
                self.variance = float(piece.loads(ask, ops).var(correction=0))
        return [
            Order(_plan(table, row), self.shape if step < ask.probes else ())
            for step, (table, row) in enumerate(zip(ops, scale, strict=True))
        ]

    def record(self, indices: Indices, order: Order, scores: Mapping[str, Tensor]) -> None:
        """The scores (L, U) by metric that a probed step over the samples `indices` gave; of what ran in full."""
        if not order.probe:
            return
        places = torch.from_numpy(np.searchsorted(self.shard, indices))
        ran = torch.ones(self.shape, dtype=torch.bool)
        if order.plan is not None:
            ran = torch.tensor(order.plan.ops) == int(Op.FULL)
        for metric, values in scores.items():
            table = self._known.setdefault(metric, torch.full((len(self.shard), *self.shape), torch.nan))
            table[places] = torch.where(ran, values, torch.nan)
        self._scored = self.job.round

    def memory(self) -> Tensors:
        """What the client writes down: the scores (S, L, U) by metric, and the round of the last of them."""
        if not self._known:
            return {}
        return {SCORED: torch.tensor(self._scored), **{_slot(name): table for name, table in self._known.items()}}

    def _due(self) -> bool:
        every = min((piece.refresh for piece in self.pieces.values() if metrics_of(piece) and piece.refresh), default=0)
        return not self._scored or bool(every and self.job.round - self._scored >= every)

    def _scores(self, batches: Sequence[Indices]) -> dict[str, Tensor]:
        rows = [torch.from_numpy(np.searchsorted(self.shard, indices)) for indices in batches]
        return {
            metric: torch.stack([table[row].nanmean(0) for row in rows]).float()
            for metric, table in self._known.items()
        }

    def _tables(self, ask: Ask) -> tuple[Tensor, Tensor]:
        """What runs, (M, L, U) int8, and what scales it, (M, L) float32."""
        ops = torch.full((ask.micro_batches, *self.shape), int(Op.FULL), dtype=torch.int8)
        for name, piece in self.pieces.items():
            table = piece.plan(ask, self.world.key("plan", name, self.job.round, self.job.client))
            if table.shape != ops.shape:
                raise FedsplitError(f"body.plans: '{name}' gave a plan {tuple(table.shape)} for {tuple(ops.shape)}.")
            ops = torch.minimum(ops, table)
        scale = torch.ones(ops.shape[:2])
        for piece in self.pieces.values():
            if hasattr(piece, "scale"):
                scale = scale * piece.scale(ask, ops)
        return ops, scale


def ask_for(world: World, sizes: Sequence[int], number: int, scores: Mapping[str, Tensor] | None = None) -> Ask:
    """What the pieces are asked for a round `number` of steps with `sizes` samples."""
    forward, full, whole = world.plan_flops.table
    return Ask(
        sizes=torch.tensor(sizes, dtype=torch.int64),
        blocks=planned_blocks(world.config, world.cut),
        depth=world.cut.depth,
        units=world.plan_flops.units,
        forward_flops=forward,
        full_flops=full,
        whole_flops=whole,
        round=number,
        rounds=world.config.rounds,
        scores=scores or {},
    )


def metrics_in(config: Config) -> tuple[str, ...]:
    """The metrics by which the pieces of `body.plans` want the units scored."""
    return tuple(sorted({metric for piece in config.pieces("body.plans") for metric in metrics_of(piece)}))


def metrics_of(piece: Any) -> tuple[str, ...]:
    """The metrics by which a piece wants the units scored."""
    return tuple(getattr(piece, "metrics", ()))


def check(world: World, sizes: Sequence[int]) -> None:
    """Whether the plans of `body.plans` can be had for a client whose steps have `sizes` samples.

    Raises:
        FedsplitError: no block that may be planned, or what a piece says of its own keys.
    """
    config = world.config
    if not config.names("body.plans"):
        return
    if not planned_blocks(config, world.cut):
        raise FedsplitError(
            f"body.plans has nothing to plan: cut.shape={config.cut.shape} leaves the server no block; "
            "set body.scope=all to plan those of the client."
        )
    ask = ask_for(world, sizes, 1)
    for name, piece in zip(config.names("body.plans"), config.pieces("body.plans"), strict=True):
        if hasattr(piece, "check"):
            try:
                piece.check(ask)
            except FedsplitError as error:
                raise FedsplitError(f"body.{name}: {error}") from None


def _plan(ops: Tensor, scale: Tensor) -> Plan | None:
    plain = bool((scale == 1).all())
    if plain and bool((ops == int(Op.FULL)).all()):
        return None
    return Plan(tuple(map(tuple, ops.tolist())), () if plain else tuple(scale.tolist()))


def _slot(metric: str) -> str:
    return f"score|{metric}"
