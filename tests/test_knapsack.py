"""The knapsack plan: its solvers are exact, its tables stay within every worker's capacity."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fedsplit.body.knapsack as module
from fedsplit.body import solve
from fedsplit.body.ask import Ask
from fedsplit.body.knapsack import METRICS, Knapsack
from fedsplit.types import FedsplitError, Op

DEEP = settings(deadline=None, max_examples=30, derandomize=True)


def ask(
    sizes: tuple[int, ...] = (16, 16, 16, 16, 7),
    front: int = 1,
    depth: int = 5,
    units: int = 3,
    extra: float = 1.0,
    scores: bool = True,
    probes: int = 0,
) -> Ask:
    """A small ask; `extra` is what a unit alone costs more than its share of a block."""
    whole = torch.arange(depth) // 3 * 3000 + 30_000 * units
    full = (whole / units * extra).ceil().long()
    stream = torch.Generator().manual_seed(5)
    table = {name: torch.rand(len(sizes), depth, units, generator=stream) for name in METRICS[:4]}
    return Ask(
        torch.tensor(sizes), tuple(range(front, depth)), depth, units, full // 3, full, whole,
        probes=probes, scores=table if scores else {},
    )  # fmt: skip


def cost(a: Ask, ops: Tensor, by: str = "compute") -> Tensor:
    """What each unit spends at most, (blocks, U), a block all FULL at what it costs as a whole."""
    planned, sizes = ops[:, list(a.blocks)], a.sizes[:, None, None].double()
    costs = torch.zeros(planned.shape, dtype=torch.float64)
    for place, block in enumerate(a.blocks):
        full, forward = (2, 1) if by == "communication" else (int(a.full_flops[block]), int(a.forward_flops[block]))
        whole = 2 if by == "communication" else int(a.whole_flops[block]) / a.units
        for row in range(len(planned)):
            all_full = bool((planned[row, place] == Op.FULL).all())
            one = torch.tensor([0.0, forward, whole if all_full else full], dtype=torch.float64)
            costs[row, place] = one[planned[row, place].long()]
    return (costs * sizes).sum(0)


def in_full(a: Ask, by: str = "compute") -> Tensor:
    return cost(a, torch.full((a.micro_batches, a.depth, a.units), int(Op.FULL)), by)


def dealt(values: Tensor, workers: int) -> list[float]:
    flat = values.flatten()
    return [float(part.sum()) for part in np.array_split(flat.numpy(), workers or len(flat))]


# Solvers


def brute(full: np.ndarray, forward: np.ndarray, weights: np.ndarray, capacity: int) -> float:
    best = 0.0
    for ops in product((Op.SKIP, Op.FORWARD, Op.FULL), repeat=len(full)):
        gain = sum((0.0, forward[i], full[i])[op] for i, op in enumerate(ops))
        weight = sum((0, weights[i, 1], weights[i, 0])[op] for i, op in enumerate(ops))
        if weight <= capacity and gain > best:
            best = gain
    return best


@st.composite
def knapsacks(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Gains of FULL and FORWARD (G, n), some forbidden, weights (n, 2) of few kinds, capacities (G,)."""
    workers, n = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    kinds = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=3))
    weights = np.array([draw(st.sampled_from([(small + more, small) for small, more in kinds])) for _ in range(n)])
    scores = st.lists(st.integers(0, 5), min_size=workers * n, max_size=workers * n)
    b, a = (np.array(draw(scores), dtype=np.float64).reshape(workers, n) for _ in range(2))
    full, forward = solve.integers(b, a)
    for gains in (full, forward):
        banned = st.lists(st.booleans(), min_size=workers * n, max_size=workers * n)
        gains[np.array(draw(banned)).reshape(workers, n)] = solve.NEVER
    capacities = np.array([draw(st.integers(0, int(weights[:, 0].sum()))) for _ in range(workers)])
    return full, forward, weights, capacities


def gained(ops: np.ndarray, full: np.ndarray, forward: np.ndarray) -> np.ndarray:
    total: np.ndarray = np.where(ops == Op.FULL, full, np.where(ops == Op.FORWARD, forward, 0.0)).sum(axis=1)
    return total


@DEEP
@given(knapsacks())
def test_counting_core_and_ortools_gain_what_brute_force_gains(case: tuple[np.ndarray, ...]) -> None:
    pytest.importorskip("ortools")
    full, forward, weights, capacities = case
    best = [brute(*worker) for worker in zip(full, forward, [weights] * len(full), capacities, strict=True)]
    for engine in ("counts", "core", "ortools"):
        ops = solve.joint(full, forward, weights[:, 0], weights[:, 1], capacities, 3, engine)
        assert gained(ops, full, forward).tolist() == best, engine
        spent = np.where(ops == Op.FULL, weights[:, 0], np.where(ops == Op.FORWARD, weights[:, 1], 0)).sum(axis=1)
        assert (spent <= capacities).all()


@pytest.mark.parametrize("two", [True, False])
def test_the_core_of_many_items_gains_what_counting_gains(two: bool) -> None:
    draw = np.random.default_rng(0)
    b, a = draw.exponential(size=(2, 2, 150))
    full, forward = solve.integers(b, a)
    forward[:, : 75 if two else None] = solve.NEVER
    size = np.where(np.arange(150) < 140, 16, 7)
    for capacity in (0, 5000, 30_000, int(3 * size.sum() * 10) - 1):
        capacities = np.array([capacity, capacity // 2])
        one, other = (
            gained(solve.joint(full, forward, size * 30, size * 10, capacities, 0, engine), full, forward)
            for engine in ("counts", "core")
        )
        assert one.tolist() == other.tolist()


@DEEP
@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 99))
def test_items_of_one_weight_are_the_top_k_by_ortools_too(n: int, k: int, seed: int) -> None:
    pytest.importorskip("ortools")
    scores = np.random.default_rng(seed).random((1, n))
    gains, weights = solve.integers(scores, 0 * scores)[0], np.full(n, 5)
    top = np.isin(np.arange(n), (-scores[0]).argsort()[:k])
    for engine in ("auto", "core", "ortools"):
        chosen = solve.knapsack(gains, weights, np.array([5 * k + 4]), seed, engine)[0]
        assert chosen.tolist() == top.tolist()


def test_equal_gains_are_decided_by_the_key_not_by_position() -> None:
    gains, weights = np.ones((1, 6)), np.full(6, 2)
    times = np.zeros(6)
    for key in range(200):
        times += solve.knapsack(gains, weights, np.array([4]), key)[0]
    assert times.sum() == 400 and times.min() > 40 and times.max() < 95  # 66.7 each on average
    odd = np.array([2, 2, 2, 2, 2, 1])  # the item of another weight ties too
    chosen = [bool(solve.knapsack(gains, odd, np.array([4]), key)[0, 5]) for key in range(50)]
    assert any(chosen) and not all(chosen)


# The piece

KNOBS = st.fixed_dictionaries(
    {
        "budget": st.sampled_from([0.05, 0.3, 0.5, 0.6, 0.9, 0.99]),
        "by": st.sampled_from(["compute", "communication"]),
        "workers": st.sampled_from([0, 1, 2, 5]),
        "choice": st.sampled_from(["joint", "bi-level"]),
        "reserve": st.sampled_from([0.0, 0.3]),
        "backward": st.sampled_from(METRICS),
        "forward": st.sampled_from(METRICS),
        "placement": st.sampled_from(["late", "anywhere", "nowhere"]),
    }
)


@DEEP
@given(KNOBS, st.sampled_from([1.0, 1.07, 2.0]), st.integers(0, 3), st.sampled_from([(8, 8, 8), (9, 9, 9, 9, 4)]))
def test_no_worker_exceeds_its_capacity(knobs: dict, extra: float, probes: int, sizes: tuple[int, ...]) -> None:  # type: ignore[type-arg]
    a, piece = ask(sizes, extra=extra, probes=probes), Knapsack(**knobs)
    ops = piece.plan(a, 4)
    assert ops.dtype == torch.int8 and ops.shape == (a.micro_batches, a.depth, a.units)
    assert (ops[:, 0] == Op.FULL).all()  # not planned
    shares = [
        spent / all_full
        for spent, all_full in zip(
            dealt(cost(a, ops, piece.by), piece.workers), dealt(in_full(a, piece.by), piece.workers), strict=True
        )
    ]
    assert max(shares) <= piece.budget + 1e-12
    assert torch.equal(piece.plan(a, 4), ops)
    late = {"late": (3, 4), "anywhere": (1, 2, 3, 4), "nowhere": ()}[piece.placement]
    assert {int(block) for block in (ops == Op.FORWARD).nonzero()[:, 1]} <= set(late)


def test_a_budget_of_one_is_all_full_even_where_units_alone_cost_more() -> None:
    for choice in ("joint", "bi-level"):
        piece = Knapsack(budget=1.0, choice=choice, reserve=0.5)
        assert (piece.plan(ask(extra=1.5), 0) == Op.FULL).all()
    mixed = Knapsack(capacities="0.4,1", workers=2).plan(ask(extra=1.5), 0)[:, 1:].reshape(5, 12)
    assert (mixed[:, 6:] == Op.FULL).all() and (mixed[:, :6] == Op.SKIP).any()


def test_probes_are_full_and_charged() -> None:
    a = ask((10, 10, 10, 10, 10))
    piece = Knapsack(budget=0.6, placement="nowhere", calibrate=4)
    assert piece.probes(a) == 3 and Knapsack(budget=0.6).probes(a) == 2 and Knapsack(budget=0.1).probes(a) == 0
    for probes in (0, 2, 3):
        ops = piece.plan(ask((10, 10, 10, 10, 10), probes=probes), 0)[:, 1:]
        assert (ops[:probes] == Op.FULL).all()
        assert ((ops == Op.FULL).sum(0) == 3).all()  # 3 of 5 per unit, probes among them
    over = piece.plan(ask((10, 10, 10, 10, 10), probes=5), 0)[:, 1:]
    assert ((over == Op.FULL).sum(0) == 3).all()


def test_the_best_scores_run_in_full() -> None:
    a = ask((8, 8, 8, 8, 8))
    ops = Knapsack(budget=0.6, placement="nowhere").plan(a, 0)[:, 1:]
    best = a.scores["fisher"][:, 1:].argsort(dim=0, descending=True)[:3]
    assert torch.equal(ops == Op.FULL, torch.zeros(ops.shape, dtype=torch.bool).scatter(0, best, True))
    piece = Knapsack(budget=0.5, workers=1, backward="depth", forward="depth", placement="nowhere")
    depth = piece.plan(ask((8, 8)), 0)
    assert (depth[:, 1:3] == Op.FULL).all() and (depth[:, 4] == Op.SKIP).all()


def test_joint_scores_at_least_as_much_as_bi_level() -> None:
    a = ask((8,) * 5)
    normal = a.scores["fisher"][:, 1:].double() / a.scores["fisher"][:, 1:].double().mean()
    values = []
    for choice, reserve in (("joint", 0.0), ("bi-level", 0.0), ("bi-level", 0.35)):
        ops = Knapsack(choice=choice, reserve=reserve, placement="anywhere", workers=3).plan(a, 0)[:, 1:]
        values.append(float((normal * ops).sum()))  # the same score forward and backward
    assert values[0] >= values[1] - 1e-6 and values[0] >= values[2] - 1e-6


def test_reserve_leaves_room_for_forward() -> None:
    a = ask((8,) * 5)
    count = [
        int((Knapsack(choice="bi-level", reserve=r, placement="anywhere").plan(a, 0) == Op.FORWARD).sum())
        for r in (0.0, 0.4)
    ]
    assert count[1] > count[0]


def test_capacities_are_dealt_in_turn() -> None:
    a = ask((10,) * 10)
    piece = Knapsack(capacities="0.2, 0.8", placement="nowhere")
    full = (piece.plan(a, 0)[:, 1:] == Op.FULL).sum(0).flatten()
    assert full.tolist() == [2, 8] * 6
    assert piece.loads(a, piece.plan(a, 0)) == pytest.approx([0.2, 0.8] * 6)


def test_blocks_as_units_share_one_op() -> None:
    a = ask(extra=1.2)
    piece = Knapsack(units="block", placement="anywhere")
    ops = piece.plan(a, 0)
    assert (ops == ops[:, :, :1]).all() and {int(op) for op in ops[:, 1:].unique()} > {0}
    loads = piece.loads(a, ops)
    assert loads.shape == (4,) and loads.max() <= 0.6 and loads.min() > 0.4


def test_loads_are_shares_of_the_cost_in_full() -> None:
    a = ask((8, 8), extra=1.2)
    table = torch.full((2, 5, 3), int(Op.FULL), dtype=torch.int8)
    piece = Knapsack(workers=2, by="communication")
    assert torch.equal(Knapsack(workers=3).loads(a, table), torch.ones(3, dtype=torch.float64))
    table[0, 1], table[1, 4, 0] = Op.FORWARD, Op.SKIP
    assert piece.loads(a, table).tolist() == pytest.approx([(24 - 3) / 24, (24 - 2) / 24])
    alone = Knapsack().loads(a, table)[9:].tolist()
    assert alone == pytest.approx([0.55, 1.0, 1.0]), "each bears its part of what a block costs anyway"
    planned = Knapsack(workers=2).plan(a, 0)
    spent, full = dealt(cost(a, planned), 2), dealt(in_full(a), 2)
    assert Knapsack(workers=2).loads(a, planned).tolist() == pytest.approx([spent[0] / full[0], spent[1] / full[1]])


def test_unknown_scores_take_the_mean_of_their_unit() -> None:
    a = ask((8,) * 4, scores=False)
    ops = [Knapsack(budget=0.5, placement="nowhere").plan(a, key) for key in (1, 2)]
    assert ((ops[0][:, 1:] == Op.FULL).sum(0) == 2).all() and not torch.equal(*ops)
    known = torch.full((4, 5, 3), torch.nan)
    known[0, 1:] = 1.0
    known[0, 2, 1] = 9.0
    known[1, 3, 0] = torch.inf
    scored = Ask(**{**vars(a), "scores": {"fisher": known}})
    best = Knapsack(budget=0.1, workers=1, placement="nowhere").plan(scored, 0)
    assert (best[:, 2, 1] == Op.FULL).all() and (best[:, 1:] == Op.FULL).sum() == 4


def test_random_tables_are_drawn_from_the_key() -> None:
    piece = Knapsack(backward="random", forward="random")
    assert piece.metrics == () and not piece.needs_gradients
    one, again, other = (piece.plan(ask(), key) for key in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    piece = Knapsack(backward="magnitude", forward="depth")
    assert piece.metrics == ("magnitude",) and not piece.needs_gradients
    assert Knapsack().metrics == ("fisher",) and Knapsack(forward="random").needs_gradients


def test_what_cannot_be_planned_is_refused_in_a_sentence() -> None:
    for text in ("0.5,0", "1.2", "half", "1/0"):
        with pytest.raises(FedsplitError, match=r"^capacities must be numbers above 0 .* got '.*'\.$"):
            Knapsack(capacities=text)
    with pytest.raises(FedsplitError, match=r"^reserve must be below 1"):
        Knapsack(reserve=1.0)
    for call in (Knapsack(workers=13).check, lambda a: Knapsack(workers=13).plan(a, 0)):
        with pytest.raises(FedsplitError, match=r"^13 workers are more than the 12 heads"):
            call(ask())
    with pytest.raises(FedsplitError, match=r"^a budget of 0.05 buys no unit of any of 3 mini-batches; raise it to at"):
        Knapsack(budget=0.05).check(ask((8, 8, 8)))


@pytest.mark.parametrize("knobs", [{}, {"workers": 2}, {"choice": "bi-level", "reserve": 0.2}, {"units": "block"}])
def test_the_budget_that_is_named_is_enough(knobs: dict) -> None:  # type: ignore[type-arg]
    a = ask((8, 8, 8), extra=1.1)
    with pytest.raises(FedsplitError) as refused:
        Knapsack(budget=0.001, **knobs).check(a)
    assert not (Knapsack(budget=0.001, **knobs).plan(a, 0)[:, 1:] == Op.FULL).any()
    named = float(str(refused.value).split("at least ")[1].split(",")[0])
    Knapsack(budget=named, **knobs).check(a)
    assert (Knapsack(budget=named, **knobs).plan(a, 0)[:, 1:] == Op.FULL).any()
    with pytest.raises(FedsplitError):
        Knapsack(budget=named * 0.9, **knobs).check(a)


def test_ortools_is_asked_for_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ortools", None)
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    Knapsack().check(ask())
    Knapsack().plan(ask(), 0)
    many = ask(tuple(range(20, 40)))  # twenty sizes
    flat = Ask(**{**vars(many), "scores": {}})
    for call in (Knapsack(workers=1).check, lambda a: Knapsack(workers=1).plan(a, 0)):
        with pytest.raises(FedsplitError, match=r"choice=joint needs OR-Tools: pip install 'fedsplit\[knapsack\]'\.$"):
            call(flat)


def test_many_sizes_and_equal_scores_are_planned_too() -> None:
    pytest.importorskip("ortools")
    a = ask((20, 21, 22, 23, 24, 25), scores=False)
    piece = Knapsack(workers=2)
    assert 0.59 < float(piece.loads(a, piece.plan(a, 0)).min()) <= 0.6
    assert torch.equal(piece.plan(a, 0), piece.plan(a, 0))


def test_importing_the_piece_does_not_import_ortools() -> None:
    code = "import sys, fedsplit, fedsplit.body.knapsack; sys.exit(any(m.startswith('ortools') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_a_block_costs_anyway_is_set_aside_once() -> None:
    """Units that cost 10 alone and 9 beside others: 0.6 of five micro-batches buys what 46 of 230 leaves over."""
    whole = torch.tensor([46])  # 1 + 5 * 9
    a = Ask(torch.full((5,), 2), (0,), 1, 5, torch.tensor([3]), torch.tensor([10]), whole)
    ops = Knapsack(placement="nowhere", backward="random", workers=1).plan(a, 0)
    full = int((ops == int(Op.FULL)).sum())
    assert full == (0.6 * 5 * 46 - 5) // 9 == 14, "as if alone it would be 13"
    spent = sum(1 + 9 * int(k) for k in (ops == int(Op.FULL)).sum((1, 2)) if k)
    assert spent <= 0.6 * 5 * 46
