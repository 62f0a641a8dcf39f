"""Exact knapsacks by counting: items of equal weight are interchangeable, so their numbers are enumerated.

Where few weights occur, counts per weight are enumerated, and the best items for given counts found by
sorting. The workers' items weigh the same, their gains differ, so all G workers are solved at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import numpy.typing as npt

from fedsplit import rng
from fedsplit.types import Op

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Ops = npt.NDArray[np.int8]
Bools = npt.NDArray[np.bool_]

NEVER = -np.inf  # the gain of what an item may not do
MOST_STEPS = 1.2e7  # array elements that counting may visit, and may hold at once
MOST_HELD = 3e6


def countable(gains: Floats, weights: Ints) -> bool:
    """Whether few enough weights (n, 2) occur to count them, for gains (G, n, 2), of FULL and of FORWARD."""
    sizes = sorted(np.unique(weights, axis=0, return_counts=True)[1].tolist())
    two = bool(np.isfinite(gains[:, :, 1]).any())
    pairs = [(n + 1) * (n + 2) // 2 if two else n + 1 for n in sizes]
    held = len(gains) * (prod(pairs[:-1]) * (sizes[-1] + 1) + (sizes[-1] + 1) ** (2 if two else 1))
    steps = len(gains) * sum((n + 1) ** (3 if two else 1) for n in sizes)
    return bool(held <= MOST_HELD and steps <= MOST_STEPS)


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


def by_counts(gains: Floats, weights: Ints, capacities: Ints, key: int) -> Ops:
    """The ops (G, n) of greatest gain, of items sorted by weight, for gains (G, n, 2) and weights (n, 2).

    Counts of the rarer weights are enumerated, the commonest is filled up.
    """
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
