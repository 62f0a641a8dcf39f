"""Exact knapsacks for many workers at once: which items run in full, forward only, or not at all.

G workers have n items each; item i weighs the same for all of them, its gains differ. Where few weights
occur, the usual case, they are counted (`fedsplit.body.counting`). Many items of a worker are first reduced
to those that a Lagrangian bound leaves open; many weights go to OR-Tools (`fedsplit.body.cpsat`). Gains are
whole numbers in float64 (see `integers`), so all ways agree exactly. `key` decides between equal gains.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from fedsplit import rng
from fedsplit.body.counting import NEVER, Bools, Floats, Ints, Ops, by_counts, countable
from fedsplit.body.cpsat import by_ortools
from fedsplit.types import Op

Engine = Literal["auto", "counts", "core", "ortools"]

RESOLUTION = 2**30
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
        found = by_counts(gains, weights, capacities, key)
    else:
        each = zip(gains, capacities.tolist(), strict=True)
        if engine == "core":
            found = np.stack([_by_core(one, weights, capacity, key) for one, capacity in each])
        else:
            found = np.stack([by_ortools(one, weights, capacity) for one, capacity in each])
    np.put_along_axis(ops, shuffled, found, axis=1)
    return ops


def knapsack(gains: Floats, weights: Ints, capacities: Ints, key: int, engine: Engine = "auto") -> Bools:
    """0/1 knapsack: the chosen items (G, n) bool; where all weigh the same, the top k by gain."""
    chosen: Bools = joint(gains, np.full_like(gains, NEVER), weights, weights, capacities, key, engine) == Op.FULL
    return chosen


def _kinds(full_weights: Ints, forward_weights: Ints) -> Ints:
    """Items (n,) of equal weights have equal numbers."""
    pairs = np.stack([full_weights, forward_weights], axis=1)
    return np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


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
            ops[core] = by_counts(few[None], weights[core], np.array([left]), key)[0]
        elif core.any():
            ops[core] = by_ortools(few, weights[core], left)
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
