"""Layer dropout: what is dropped, how often, and what never is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsplit.body.ask import Ask
from fedsplit.body.layerdrop import SHAPES, LayerDrop, draw_fixed, droppable, rates
from fedsplit.rng import key
from fedsplit.types import FedsplitError, Op

KEEPS = ("none", "first", "last", "both")
UNITS = 3


def ask(n: int = 8, m: int = 4, *, before: int = 2, after: int = 1, round: int = 1, rounds: int = 1) -> Ask:
    """M micro-batches before `n` plannable blocks, with others before and after them."""
    depth = before + n + after
    flops = torch.full((depth,), 10)
    return Ask(
        torch.full((m,), 4), tuple(range(before, before + n)), depth, UNITS, flops, 3 * flops, 30 * flops, round, rounds
    )


def dropped(piece: LayerDrop, asked: Ask, stream: int = 0) -> Tensor:
    """What the plan drops (M, L) bool; a block is dropped whole or not at all."""
    ops = piece.plan(asked, stream)
    assert ops.dtype == torch.int8 and ops.shape == (asked.micro_batches, asked.depth, asked.units)
    skipped = ops == int(Op.SKIP)
    assert torch.equal(skipped, skipped[:, :, :1].expand_as(skipped))
    assert (ops[~skipped] == int(Op.FULL)).all()
    return skipped[:, :, 0]


@given(st.sampled_from(SHAPES), st.floats(0, 0.999), st.integers(2, 40), st.sampled_from(KEEPS))
def test_rates_have_their_mean_and_stay_within_bounds(shape: str, rate: float, n: int, keep: str) -> None:
    found, free = rates(shape, rate, n, keep), droppable(n, keep)
    assert found.dtype == torch.float64 and (found >= 0).all() and (found <= 1).all()
    if rate * n < len(free):
        assert (found < 1).all()
    assert float(found.mean()) == pytest.approx(min(rate, len(free) / n), abs=1e-12)
    assert not found[[i for i in range(n) if i not in free]].any()


@given(st.floats(0, 0.999), st.integers(2, 40))
def test_shapes_are_what_they_say(rate: float, n: int) -> None:
    rise, fall, bell = (rates(shape, rate, n) for shape in ("increasing", "decreasing", "bell"))
    assert (rise.diff() >= -1e-12).all()
    assert torch.allclose(fall, rise.flip(0), rtol=0, atol=1e-12)
    assert torch.allclose(bell, bell.flip(0), rtol=0, atol=1e-12)
    assert (bell[: (n + 1) // 2].diff() >= -1e-12).all()
    assert torch.allclose(rates("uniform", rate, n), torch.tensor(rate, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_increasing_shape_is_the_linear_form_below_the_cap() -> None:
    line = torch.tensor([2 * 0.4 * l / 11 for l in range(12)], dtype=torch.float64)  # noqa: E741
    assert torch.allclose(rates("increasing", 0.4, 12), line, rtol=0, atol=1e-12)
    capped = rates("increasing", 0.6, 12)
    steps = capped[:8].diff()  # what the cap cuts off makes the line steeper, it does not lift its start
    assert capped.max() == 0.95 and capped[0] == 0
    assert torch.allclose(steps, steps[:1], rtol=0, atol=1e-12) and steps[0] > 2 * 0.6 / 11
    assert rates("increasing", 0.9, 4).tolist() == pytest.approx([0.75, 0.95, 0.95, 0.95], abs=1e-12)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("count", ["fixed", "bernoulli"])
def test_a_lone_block_is_never_dropped(n: int, count: str) -> None:
    for keep in KEEPS:
        assert not dropped(LayerDrop(0.9, count=count, keep=keep, recover=0.0), ask(n)).any()


@given(st.floats(0, 0.999), st.integers(2, 16), st.sampled_from(SHAPES), st.sampled_from(KEEPS), st.integers(0, 2**32))
def test_a_fixed_count_is_exact_in_every_micro_batch(rate: float, n: int, shape: str, keep: str, stream: int) -> None:
    piece = LayerDrop(rate, shape, keep=keep, recover=0.0)
    found = dropped(piece, ask(n), stream)
    wanted = min(round(rate * n), len(droppable(n, keep)), n - 1)
    assert (found.sum(dim=1) == wanted).all()
    assert not found[:, :2].any() and not found[:, -1:].any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("n", "rate", "keep"), [(8, 0.5, "none"), (8, 0.5, "both"), (5, 0.6, "first"), (4, 0.75, "none")]
)
def test_a_fixed_count_drops_each_block_as_often_as_its_rate(shape: str, n: int, rate: float, keep: str) -> None:
    piece, draws = LayerDrop(rate, shape, keep=keep, recover=0.0), 2000
    often = dropped(piece, ask(n, draws, before=0, after=0)).double().mean(dim=0)
    # More than four standard errors of a frequency of 2,000 draws (0.0112 at 1/2).
    assert (often - rates(shape, piece.dropped(n) / n, n, keep)).abs().max() < 0.05


def test_a_fixed_count_does_not_always_drop_the_same_neighbours_together() -> None:
    chances = torch.full((4,), 0.5, dtype=torch.float64)
    seen = {tuple(sorted(draw_fixed(chances, 2, key(0, draw)).tolist())) for draw in range(300)}
    assert len(seen) == 6


def test_draw_fixed_takes_what_is_certain_and_leaves_what_is_impossible() -> None:
    chances = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert draw_fixed(chances, 2, 5).tolist() == [1, 2]
    chances = torch.tensor([0.0, 0.1, 0.9, 0.0], dtype=torch.float64)
    assert {int(draw_fixed(chances, 1, stream)) for stream in range(200)} == {1, 2}


@pytest.mark.parametrize("shape", SHAPES)
def test_bernoulli_has_the_mean_and_a_number_that_varies(shape: str) -> None:
    found = dropped(LayerDrop(0.5, shape, "bernoulli", recover=0.0), ask(12, 4000, before=0, after=0))
    often, expected = found.double().mean(dim=0), rates(shape, 0.5, 12, "both")
    assert (often - expected).abs().max() < 0.035
    assert len(set(found.sum(dim=1).tolist())) > 2


@given(st.floats(0.5, 0.999), st.integers(1, 6), st.sampled_from(SHAPES), st.sampled_from(KEEPS), st.integers(0, 2**32))
def test_one_block_always_runs(rate: float, n: int, shape: str, keep: str, stream: int) -> None:
    for count in ("fixed", "bernoulli"):
        found = dropped(LayerDrop(rate, shape, count, keep, recover=0.0), ask(n, 20, before=0, after=0), stream)
        assert (found.sum(dim=1) < n).all()


def test_a_bernoulli_draw_of_all_spares_one_and_not_always_the_same() -> None:
    found = dropped(LayerDrop(0.99, "uniform", "bernoulli", "none", recover=0.0), ask(3, 200, before=0, after=0))
    assert found.sum(dim=1).max() == 2
    assert (found.logical_not().sum(dim=0) > 40).all()


@pytest.mark.parametrize("count", ["fixed", "bernoulli"])
def test_kept_blocks_are_never_dropped(count: str) -> None:
    for keep, n, runs in (("first", 5, [0]), ("last", 5, [4]), ("both", 5, [0, 4]), ("both", 2, [0]), ("last", 2, [1])):
        found = dropped(LayerDrop(0.8, "uniform", count, keep, recover=0.0), ask(n, 60, before=0, after=0))
        assert not found[:, runs].any() and found.any(dim=0).sum() == n - len(runs)


def test_rate_0_is_off() -> None:
    for count in ("fixed", "bernoulli"):
        asked = ask()
        ops = LayerDrop(0.0, count=count, rescale="inverse").plan(asked, 1)
        assert (ops == int(Op.FULL)).all()
        assert torch.equal(LayerDrop(0.0, rescale="inverse").scale(asked, ops), torch.ones(4, asked.depth))


def test_the_last_rounds_run_in_full() -> None:
    piece = LayerDrop(0.5, recover=0.2)
    full = [not dropped(piece, ask(round=number, rounds=10)).any() for number in range(1, 11)]
    assert full == [False] * 8 + [True] * 2
    assert not LayerDrop(0.5, recover=0.0).recovers(10, 10) and LayerDrop(0.5, recover=1.0).recovers(1, 10)


def test_a_micro_batch_does_not_depend_on_how_many_there_are() -> None:
    for count in ("fixed", "bernoulli"):
        piece = LayerDrop(0.5, count=count)
        few, many = piece.plan(ask(m=3, rounds=2), 7), piece.plan(ask(m=9, rounds=2), 7)
        assert torch.equal(few, many[:3])
        assert not torch.equal(many, piece.plan(ask(m=9, rounds=2), 8))
        assert len({tuple(row.flatten().tolist()) for row in many}) > 1


def test_rescaling() -> None:
    asked = ask(8)
    piece = LayerDrop(0.5, rescale="inverse", recover=0.0)
    ops = piece.plan(asked, 3)
    factors, skipped = piece.scale(asked, ops), ops[:, :, 0] == int(Op.SKIP)
    assert factors.dtype == torch.float32 and factors.shape == (4, asked.depth)
    assert (factors[:, 2:10][~skipped[:, 2:10]] == 2.0).all() and (factors[skipped] == 1.0).all()
    assert (factors[:, [0, 1, 10]] == 1.0).all()
    assert torch.equal(LayerDrop(0.5).scale(asked, ops), torch.ones(4, asked.depth))
    ops[0] = int(Op.SKIP)
    ops[1, 2:10] = int(Op.FORWARD)
    assert torch.equal(piece.scale(asked, ops)[:2], torch.ones(2, asked.depth))


def test_refusals() -> None:
    with pytest.raises(FedsplitError, match=r"^rate=1 leaves no block; give less than 1\.$"):
        LayerDrop(1.0)
    with pytest.raises(FedsplitError, match=r"drop 3 of 3 blocks, of which only 1 may be; give at most rate=0\.33 or"):
        LayerDrop(0.9).check(ask(3))
    with pytest.raises(FedsplitError, match=r"drop 2\.7 of 3 blocks, of which only 1"):
        LayerDrop(0.9, count="bernoulli").check(ask(3))
    with pytest.raises(FedsplitError, match=r"drop 4 of 4 blocks, of which only 3 may be; give at most rate=0\.75\.$"):
        LayerDrop(0.9, keep="none").check(ask(4))
    with pytest.raises(FedsplitError, match=r"none of the body's 1 block may be dropped"):
        LayerDrop(0.5).check(ask(1))
    for fine in (LayerDrop(0.5), LayerDrop(0.75), LayerDrop(0.9, count="bernoulli", keep="none"), LayerDrop(0.0)):
        fine.check(ask(8))
    LayerDrop(0.0).check(ask(0))


@given(st.floats(0, 0.999), st.integers(2, 16), st.sampled_from(KEEPS))
def test_what_a_refusal_proposes_is_not_refused(rate: float, n: int, keep: str) -> None:
    try:
        LayerDrop(rate, keep=keep).check(ask(n))
    except FedsplitError as refusal:
        LayerDrop(float(str(refusal).split("rate=")[2].split(" ")[0].rstrip(".")), keep=keep).check(ask(n))
