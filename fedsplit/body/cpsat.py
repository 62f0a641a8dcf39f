"""Exact knapsacks by OR-Tools' CP-SAT, for many weights."""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np

from fedsplit.body.counting import Floats, Ints, Ops
from fedsplit.types import Op


def by_ortools(gains: Floats, weights: Ints, capacity: int) -> Ops:
    """The ops (n,) of greatest gain of one worker, for gains and weights (n, 2), of FULL and of FORWARD.

    Items alike in gains and weights share one variable per op, their count.

    Raises:
        ImportError: OR-Tools is missing.
    """
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
