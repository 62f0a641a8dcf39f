"""Exact knapsacks for many workers at once: which items run in full, forward only, or not at all.

G workers have n items each; item i weighs the same for all of them, its gains differ. Items of equal
weight are interchangeable, so where few weights occur, the usual case, counts per weight are enumerated
and the best items for given counts found by sorting. Many items of a worker are first reduced to those that
a Lagrangian bound leaves open; many weights go to OR-Tools. Gains are whole numbers in float64 (see
`integers`), so all ways agree exactly. `key` decides between equal gains.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import gcd, prod
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedsplit import rng
from fedsplit.types import Op

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Ops = npt.NDArray[np.int8]
Bools = npt.NDArray[np.bool_]
Engine = Literal["auto", "counts", "core", "ortools"]

NEVER = -np.inf  # the gain of what an item may not do
RESOLUTION = 2**30
MOST_STEPS = 1.2e7  # array elements that counting may visit, and may hold at once
MOST_HELD = 3e6
CORE = 40  # items of a first guess at the core


def integers(backward: Floats, forward: Floats) -> tuple[Floats, Floats]:
    """The gains (G, n) of FULL and of FORWARD as whole numbers, from scores of 0 and more (G, n).

    A worker's best item is scaled to 2^30. FORWARD gains at least 1 and FULL more than that, so that
    capacity is spent on items that score 0 too.
    """
    most = (backward + forward).max(axis=1, initial=0.0, keepdims=True)
    scale = RESOLUTION / np.where(most > 0, most, 1.0)
    only = 1 + np.rint(forward * scale)
    return only + 1 + np.rint(backward * scale), only


def joint(
    full: Floats,
    forward: Floats,
    full_weights: Ints,
    forward_weights: Ints,
    capacities: Ints,
    key: int,
    engine: Engine = "auto",
) -> Ops:
    """Multiple-choice knapsack: the ops (G, n) int8 of greatest total gain within each worker's capacity.

    Args:
        full: gains (G, n) of FULL, positive whole numbers below 2^40; NEVER where an item may not.
        forward: gains (G, n) of FORWARD, likewise.
        full_weights: weights (n,) of FULL, above 0.
        forward_weights: weights (n,) of FORWARD, above 0.
        capacities: the workers' capacities (G,).
        key: the stream that decides between tables of equal gain.
        engine: "counts", "core" or "ortools" to force one; "auto" counts where it is `countable`.

    Raises:
        ImportError: OR-Tools is needed and missing.
    """
    ops = np.zeros(full.shape, dtype=np.int8)
    if not ops.size:
        return ops
    # Solvers decide ties by position, so each worker's items stand in an order of its own; within equal
    # weights, which come together for the sake of counting.
    kinds = _kinds(full_weights, forward_weights)
    shuffled = rng.numpy_rng(rng.key(key, "order")).random(full.shape).argsort(axis=1)
    shuffled = np.take_along_axis(shuffled, kinds[shuffled].argsort(axis=1, kind="stable"), axis=1)
    gains = np.stack([np.take_along_axis(gain, shuffled, axis=1) for gain in (full, forward)], axis=2)
    weights = np.stack([full_weights, forward_weights], axis=1)[shuffled[0]]  # the same for every worker
    if engine == "auto" and not countable(gains, weights):
        engine = "core"
    if engine in ("auto", "counts"):
        found = _by_counts(gains, weights, capacities, key)
    else:
        solve = _by_core if engine == "core" else _by_ortools
        found = np.stack(
            [solve(one, weights, capacity, key) for one, capacity in zip(gains, capacities.tolist(), strict=True)]
        )
    np.put_along_axis(ops, shuffled, found, axis=1)
    return ops


def knapsack(gains: Floats, weights: Ints, capacities: Ints, key: int, engine: Engine = "auto") -> Bools:
    """0/1 knapsack: the chosen items (G, n) bool; where all weigh the same, the top k by gain."""
    chosen: Bools = joint(gains, np.full_like(gains, NEVER), weights, weights, capacities, key, engine) == Op.FULL
    return chosen


def countable(gains: Floats, weights: Ints) -> bool:
    """Whether few enough weights (n, 2) occur to count them, for gains (G, n, 2), of FULL and of FORWARD."""
    sizes = sorted(np.unique(weights, axis=0, return_counts=True)[1].tolist())
    two = bool(np.isfinite(gains[:, :, 1]).any())
    pairs = [(n + 1) * (n + 2) // 2 if two else n + 1 for n in sizes]
    held = len(gains) * (prod(pairs[:-1]) * (sizes[-1] + 1) + (sizes[-1] + 1) ** (2 if two else 1))
    steps = len(gains) * sum((n + 1) ** (3 if two else 1) for n in sizes)
    return bool(held <= MOST_HELD and steps <= MOST_STEPS)


def _kinds(full_weights: Ints, forward_weights: Ints) -> Ints:
    """Items (n,) of equal weights have equal numbers."""
    pairs = np.stack([full_weights, forward_weights], axis=1)
    return np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


@dataclass(frozen=True)
class _Kind:
    """Items of one weight: gains (G, n) of FULL and of FORWARD, ordered by what FULL gains over FORWARD.

    With i before j in that order, FORWARD for i and FULL for j gain no more than the reverse. So for some t
    the FULL items are the best among the first t, the FORWARD items the best among the others.
    """

    start: int
    order: Ints
    full: Floats
    forward: Floats

    @property
    def n(self) -> int:
        return int(self.full.shape[1])

    @cached_property
    def splits(self) -> Ints:
        """The t (T,) to try: n alone where no item may run forward only."""
        return np.arange(self.n + 1) if np.isfinite(self.forward).any() else np.array([self.n])

    @cached_property
    def heads(self) -> Floats:
        """(G, T, n + 1): what the k best of the first t gain in full."""
        return _best(self.full, np.arange(self.n) < self.splits[:, None])

    @cached_property
    def rests(self) -> Floats:
        """(G, T, n + 1): what at most k of the others gain forward; (G, T, 1) where none may."""
        best = _best(self.forward, np.arange(self.n) >= self.splits[:, None])
        return np.maximum.accumulate(best if len(self.splits) > 1 else best[:, :, :1], axis=2)

    @cached_property
    def gains(self) -> Floats:
        """(G, n + 1, n + 1 or 1): the most that so many FULL and at most so many FORWARD items gain."""
        gains = np.full((len(self.full), self.n + 1, self.rests.shape[2]), NEVER)
        for t in range(len(self.splits)):
            np.maximum(gains, self.heads[:, t, :, None] + self.rests[:, t, None, :], out=gains)
        return gains

    def pick(self, full: Ints, forward: Ints) -> Ops:
        """The ops (G, n) that gain it, for the counts (G,), in the order of the items before sorting."""
        rows = np.arange(len(full))
        split = self.splits[(self.heads[rows, :, full] + self.rests[rows, :, forward]).argmax(axis=1)]
        first = np.arange(self.n) < split[:, None]
        ops = np.zeros(self.full.shape, dtype=np.int8)
        for op, gain, members, count in (
            (Op.FULL, self.full, first, full),
            (Op.FORWARD, self.forward, ~first, forward),
        ):
            gain = np.where(members, gain, NEVER)
            rank = (-gain).argsort(axis=1, kind="stable").argsort(axis=1)
            ops[(rank < count[:, None]) & np.isfinite(gain)] = op
        unsorted = np.empty_like(ops)
        np.put_along_axis(unsorted, self.order, ops, axis=1)
        return unsorted


def _best(gains: Floats, members: Bools) -> Floats:
    """(G, T, n + 1): the sums of the k best of `gains` (G, n) among `members` (T, n)."""
    sums = -np.sort(np.where(members, -gains[:, None, :], np.inf), axis=2)
    return np.pad(sums.cumsum(axis=2), ((0, 0), (0, 0), (1, 0)))


def _by_counts(gains: Floats, weights: Ints, capacities: Ints, key: int) -> Ops:
    """`joint` for items (G, n) sorted by weight: counts of the rarer weights enumerated, the commonest filled up."""
    starts = np.flatnonzero(np.r_[True, (np.diff(weights, axis=0) != 0).any(axis=1)])
    kinds = []
    for start, items in zip(starts.tolist(), np.split(gains, starts[1:], axis=1), strict=True):
        may = np.isfinite(items)
        over = np.subtract(items[:, :, 0], items[:, :, 1], where=may.all(axis=2), out=np.full(may.shape[:2], np.inf))
        over[~may[:, :, 0]] = NEVER  # what may not run in full stands last, what only may first
        order = (-over).argsort(axis=1, kind="stable")
        ordered = np.take_along_axis(items, order[:, :, None], axis=1)
        kinds.append(_Kind(start, order, ordered[:, :, 0], ordered[:, :, 1]))
    kinds.sort(key=lambda kind: kind.n)
    rare, main = kinds[:-1], kinds[-1]

    counts, used, gained = np.zeros((1, 0), dtype=np.int64), np.zeros(1, dtype=np.int64), np.zeros((len(gains), 1))
    for kind in rare:
        a, b = np.nonzero(np.add.outer(np.arange(kind.n + 1), np.arange(kind.gains.shape[2])) <= kind.n)
        used = np.add.outer(used, np.stack([a, b], axis=1) @ weights[kind.start]).reshape(-1)
        gained = (gained[:, :, None] + kind.gains[:, a, b][:, None, :]).reshape(len(gains), -1)
        counts = np.concatenate([np.repeat(counts, len(a), 0), np.tile(np.stack([a, b], 1), (len(counts), 1))], axis=1)
        fits = used <= capacities.max()
        counts, used, gained = counts[fits], used[fits], gained[:, fits]

    weight, forward_weight = weights[main.start].tolist()
    full = np.arange(main.n + 1)
    left = (capacities[:, None] - used)[:, :, None] - full * weight
    forward = np.clip(left // forward_weight, 0, main.gains.shape[2] - 1)
    total = gained[:, :, None] + main.gains[np.arange(len(gains))[:, None, None], full, forward]
    total = np.where(left >= 0, total, NEVER).reshape(len(gains), -1)
    ties = rng.numpy_rng(rng.key(key, "ties")).random(total.shape)
    best = np.where(total == total.max(axis=1, keepdims=True), ties, -1.0).argmax(axis=1)

    rows, (chosen, full_count) = np.arange(len(gains)), np.divmod(best, main.n + 1)
    ops = np.zeros(gains.shape[:2], dtype=np.int8)
    ops[:, main.start : main.start + main.n] = main.pick(full_count, forward[rows, chosen, full_count])
    for place, kind in enumerate(rare):
        a, b = counts[chosen, 2 * place], counts[chosen, 2 * place + 1]
        ops[:, kind.start : kind.start + kind.n] = kind.pick(a, b)
    return ops


def _by_core(gains: Floats, weights: Ints, capacity: int, key: int) -> Ops:
    """`joint` for one worker: what a Lagrangian bound decides is left to it, the rest, the core, is solved.

    For any price of capacity, sum(max(0, gain - price * weight)) + price * capacity bounds the total from
    above. A choice that loses more against the best choice of its item than the bound is above a known
    total is in no better table.
    """
    options = np.concatenate([np.zeros((len(gains), 1)), gains[:, ::-1]], axis=1)  # by Op
    costs = np.concatenate([np.zeros((len(gains), 1), dtype=np.int64), weights[:, ::-1]], axis=1)
    rows, low, high = np.arange(len(gains)), 0.0, float((gains / weights).max(initial=0.0)) + 1.0
    for _ in range(100):  # high always fits
        price = (low + high) / 2
        fits = costs[rows, (options - price * costs).argmax(axis=1)].sum() <= capacity
        low, high = (low, price) if fits else (price, high)
    reduced = options - high * costs
    second = np.sort(reduced.max(axis=1, keepdims=True) - reduced, axis=1)[:, 1]
    best = reduced.argmax(axis=1)

    def solved(possible: Bools) -> Ops:
        """The best table whose items keep to their `possible` ops (n, 3); SKIP is where a choice is left."""
        ops: Ops = best.astype(np.int8)
        core = possible.sum(axis=1) > 1
        left = capacity - int(costs[rows, ops][~core].sum())
        few = np.where(possible[core, :0:-1], gains[core], NEVER)
        if core.any() and countable(few[None], weights[core]):
            ops[core] = _by_counts(few[None], weights[core], np.array([left]), key)[0]
        elif core.any():
            ops[core] = _by_ortools(few, weights[core], left, key)
        return ops

    known = options[rows, _filled(options, costs, best, capacity)].sum()
    near = np.zeros(len(gains), dtype=bool)
    near[second.argsort(kind="stable")[:CORE]] = True
    if len(gains) > CORE and countable(gains[None, near], weights[near]):  # a better total shrinks the core
        known = max(known, options[rows, solved(near[:, None] & np.isfinite(options))].sum())
    gap = reduced.max(axis=1).sum() + high * capacity - known + 1.0  # 1 for what float64 may lose
    return solved(reduced.max(axis=1, keepdims=True) - reduced <= gap)


def _filled(options: Floats, costs: Ints, choice: Ints, capacity: int) -> Ints:
    """A table that fits, (n,), from one that does: what is left goes to the best upgrades, one by one."""
    choice, rows = choice.copy(), np.arange(len(choice))
    while True:
        more = costs - costs[rows, choice][:, None]
        better = options - options[rows, choice][:, None]
        left = capacity - costs[rows, choice].sum()
        better[(more > left) | (better <= 0)] = NEVER
        item, op = np.unravel_index(better.argmax(), better.shape)
        if better[item, op] <= 0:
            return choice
        choice[item] = op


def _by_ortools(gains: Floats, weights: Ints, capacity: int, key: int) -> Ops:
    """`joint` for one worker by CP-SAT. Items alike in gains and weights share one variable per op, their count."""
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    alike, kind, counts = np.unique(np.hstack([gains, weights]), axis=0, return_inverse=True, return_counts=True)
    chosen: list[Any] = []
    values: list[int] = []
    costs: list[int] = []
    for row, count in zip(alike.tolist(), counts.tolist(), strict=True):
        pair = [model.new_int_var(0, count if np.isfinite(gain) else 0, "") for gain in row[:2]]
        model.add(sum(pair) <= count)
        chosen += pair
        values += [int(gain) if np.isfinite(gain) else 0 for gain in row[:2]]
        costs += [int(weight) for weight in row[2:]]
    unit = gcd(*costs)
    model.add(cp_model.LinearExpr.weighted_sum(chosen, [cost // unit for cost in costs]) <= capacity // unit)
    model.maximize(cp_model.LinearExpr.weighted_sum(chosen, values))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    status = solver.solve(model)
    assert status == cp_model.OPTIMAL, solver.status_name(status)
    ops = np.zeros(len(gains), dtype=np.int8)
    for number in range(len(alike)):
        full, forward = (int(solver.value(variable)) for variable in chosen[2 * number : 2 * number + 2])
        members = np.flatnonzero(kind.reshape(-1) == number)
        ops[members[:full]] = Op.FULL
        ops[members[full : full + forward]] = Op.FORWARD
    return ops
