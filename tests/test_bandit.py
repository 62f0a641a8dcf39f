"""The bandit that chooses rates of layer dropout: it finds, follows, forgets and repeats itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsplit.control.bandit import COLUMNS, RATE, SHAPE, Bandit
from fedsplit.types import FedsplitError

POLICIES = ("epsilon-greedy", "ucb")
Entry = dict[str, Any]


def play(
    bandit: Bandit,
    worth: Callable[[int, int, float], float],
    rounds: int,
    *,
    key: int = 0,
    json_every_round: bool = False,
) -> list[Entry]:
    """Rounds in which group g's rate earns `worth(round, g, rate)` and noise; the rows of all of them."""
    memory: dict[str, Any] = {}
    noise, table = np.random.default_rng(1), []
    for round in range(1, rounds + 1):
        choices, memory = bandit.propose(memory, round, bandit.groups, key)
        gains = [
            worth(round, g, float(choice[RATE])) + 0.05 * noise.standard_normal() for g, choice in enumerate(choices)
        ]
        memory = bandit.observe(memory, round, gains, [2.0] * bandit.groups)
        if json_every_round:
            memory = json.loads(json.dumps(memory, allow_nan=False))
        table += bandit.rows(memory, round)
    return table


def share(table: list[Entry], rate: float, first: int, last: int, group: int = 0) -> float:
    """How often `group` chose `rate` in rounds `first` to `last`."""
    chosen = [row["rate"] for row in table if row["group"] == group and first <= row["round"] <= last]
    return chosen.count(rate) / len(chosen)


def bandit(policy: str, **changes: Any) -> Bandit:
    return Bandit(**{"policy": policy, "window": 40, "exploration": 0.3, **changes})


WORTH = {0.0: 0.2, 0.2: 0.5, 0.4: 1.0, 0.6: 0.4}


@pytest.mark.parametrize("policy", POLICIES)
def test_it_finds_the_best_arm(policy: str) -> None:
    table = play(bandit(policy), lambda _round, _group, rate: WORTH[rate], 120)
    assert share(table, 0.4, 61, 120) > 0.75  # by chance 0.25


@pytest.mark.parametrize("policy", POLICIES)
def test_it_finds_the_least_bad_arm(policy: str) -> None:
    table = play(bandit(policy), lambda _round, _group, rate: WORTH[rate] - 1.2, 120)
    assert share(table, 0.4, 61, 120) > 0.75


@pytest.mark.parametrize("policy", POLICIES)
def test_it_follows_a_change_because_it_forgets(policy: str) -> None:
    def worth(round: int, _group: int, rate: float) -> float:
        return 2.0 if round > 100 and rate == 0.0 else WORTH[rate]  # nothing tells but the arm itself

    follows = play(bandit(policy, window=20, decay=0.9), worth, 200)
    assert share(follows, 0.4, 61, 100) > 0.6 and share(follows, 0.0, 141, 200) > 0.6
    remembers = play(bandit(policy, window=10_000, decay=0.9), worth, 200)
    assert share(follows, 0.0, 111, 170) > share(remembers, 0.0, 111, 170) + 0.2


@pytest.mark.parametrize("policy", POLICIES)
def test_groups_learn_apart(policy: str) -> None:
    table = play(bandit(policy, groups=2), lambda _round, g, rate: WORTH[rate] if g else 1 - rate, 120)
    assert share(table, 0.0, 61, 120, group=0) > 0.7 and share(table, 0.4, 61, 120, group=1) > 0.7


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_survives_json_and_the_same_key_chooses_the_same(policy: str) -> None:
    piece = bandit(policy, groups=2, shapes="increasing,bell", epsilon=0.6)
    tables = [
        play(piece, lambda _round, g, rate: rate * g, 60, json_every_round=through_json)
        for through_json in (False, True)
    ]
    assert tables[0] == tables[1]
    assert play(piece, lambda _round, g, rate: rate * g, 60, key=1) != tables[0]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_arm_is_tried_first_in_an_order_of_the_key(policy: str) -> None:
    piece = Bandit(policy=policy)
    orders = set()
    for key in range(8):
        table = play(piece, lambda *_: 0.0, 5, key=key)
        orders.add(tuple(row["rate"] for row in table[:4]))
        assert sorted(orders.copy().pop()) == [0.0, 0.2, 0.4, 0.6]
        assert all(row["explored"] for row in table[:4])
    assert len(orders) > 3


def test_an_arm_whose_rewards_have_expired_is_tried_again() -> None:
    piece = Bandit(epsilon=0.0, window=6)
    table = play(piece, lambda _round, _group, rate: WORTH[rate], 60)
    for round in range(7, 61):
        window = [row["rate"] for row in table if round - 6 <= row["round"] <= round]
        assert set(window) == {0.0, 0.2, 0.4, 0.6}


def test_epsilon_is_the_share_of_random_arms_and_decays() -> None:
    def explored(epsilon: float, decay: float) -> list[bool]:
        table = play(bandit("epsilon-greedy", epsilon=epsilon, decay=decay, window=10_000), lambda *a: WORTH[a[2]], 400)
        return [row["explored"] for row in table[4:]]

    assert not any(explored(0.0, 1.0))
    assert np.mean(explored(1.0, 1.0)) == pytest.approx(0.75, abs=0.09)  # a random arm is the best in 1 of 4
    assert np.mean(explored(0.4, 1.0)) == pytest.approx(0.3, abs=0.1)
    late = explored(1.0, 0.95)
    assert np.mean(late[:20]) > 0.3 and not any(late[200:])


def test_more_exploration_tries_other_arms_more_often() -> None:
    often = [
        share(play(bandit("ucb", exploration=weight), lambda *a: WORTH[a[2]], 120), 0.4, 5, 120)
        for weight in (0, 0.3, 2)
    ]
    assert often[0] > often[1] > often[2]
    scaled = [
        [row["rate"] for row in play(bandit("ucb"), lambda *a, size=size: size * WORTH[a[2]], 8)] for size in (1e4, 1e6)
    ]
    assert scaled[0] == scaled[1]  # the unit of the reward does not matter; the noise is nothing here


@pytest.mark.parametrize(
    ("gain", "seconds"),
    [(None, 0.0), (None, None), (0.1, 0.0), (0.1, None), (float("nan"), 1.0), (0.1, float("inf")), (0.1, float("nan"))],
)
def test_nothing_is_learnt_without_a_gain_or_time(gain: float | None, seconds: float | None) -> None:
    piece = Bandit(rates="0,0.4")
    choices, memory = piece.propose({}, 1, 1, 0)
    memory = piece.observe(memory, 1, [gain], [seconds])
    (row,) = piece.rows(memory, 1)
    assert row["reward"] == "" and row["rate"] == choices[0][RATE]
    json.dumps(memory, allow_nan=False)
    chosen = {piece.propose(memory, 2, 1, key)[0][0][RATE] for key in range(20)}
    assert chosen == {0.0, 0.4}  # both are still untried


def test_methods_leave_the_memory_they_are_given() -> None:
    piece = Bandit(groups=2)
    _, first = piece.propose({}, 1, 2, 0)
    kept = copy.deepcopy(first)
    second = piece.observe(first, 1, [0.1, 0.2], [1.0, 4.0])
    assert first == kept and second != first
    kept = copy.deepcopy(second)
    piece.propose(second, 2, 2, 0)
    assert second == kept
    assert [row["reward"] for row in piece.rows(second, 1)] == [0.1, 0.05]


def test_a_round_proposed_again_has_one_row_a_group_and_memory_is_bounded() -> None:
    piece = Bandit(groups=2)
    memory: dict[str, Any] = {}
    for round in range(1, 40):
        for attempt in (0, 1):
            choices, memory = piece.propose(memory, round, 2, attempt)
        assert len(piece.rows(memory, round)) == 2
        assert [row["rate"] for row in piece.rows(memory, round)] == [choice[RATE] for choice in choices]
        memory = piece.observe(memory, round, [0.1, None], [1.0, 0.0])
    assert len(memory["tries"]) == 2 * (piece.window + 1)


def test_arms_are_the_product_and_rate_0_stands_once() -> None:
    piece = Bandit("0, 0.5", "increasing,bell")
    assert piece.arms == ((0.0, "increasing"), (0.5, "increasing"), (0.5, "bell"))
    assert piece.keys == (RATE, SHAPE)
    assert set(piece.propose({}, 1, 1, 0)[0][0]) == set(piece.keys)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rates": ""}, "rates is empty"),
        ({"rates": "0,fast"}, "'fast', which is not a number"),
        ({"rates": "0,1"}, "has 1; every rate must be"),
        ({"rates": "-0.1"}, "every rate must be"),
        ({"rates": "nan"}, "every rate must be"),
        ({"rates": "0.2,0.20"}, "more than once"),
        ({"shapes": " , "}, "shapes is empty"),
        ({"shapes": "increasing,round"}, "'round', which is no shape; known: increasing, uniform"),
        ({"shapes": "bell,bell"}, "more than once"),
        ({"window": 3}, "forgets the first of 4 arms .* give at least 4"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FedsplitError, match=message) as refused:
        Bandit(**settings)
    assert "bandit" not in str(refused.value) and "\n" not in str(refused.value)


def test_rows_and_their_picture(tmp_path: Path) -> None:
    piece = Bandit(groups=2, shapes="increasing,bell")
    table = play(piece, lambda _round, g, rate: rate * g, 12)
    assert all(tuple(row) == piece.columns == COLUMNS for row in table) and len(table) == 24
    table[3]["reward"] = ""
    text = [{name: str(value) for name, value in row.items()} for row in table]
    pictures = [piece.draw(source, tmp_path / f"{name}.png") for name, source in (("values", table), ("text", text))]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert piece.draw([], tmp_path / "empty.png").stat().st_size > 0
