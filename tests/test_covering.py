"""The sets of pieces that other tests run: they cover, keep apart, and name who is to blame."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from covering import Piece, check_cover, covering, lists, pairs, together

PIECES: list[Piece] = [(f"list-{number % 3}", str(number)) for number in range(12)] + [
    ("share.merge", "fedavg"),
    ("share.merge", "uniform"),
]
CONFLICTS = {frozenset(PIECES[:2]), frozenset(PIECES[3:6]), frozenset({PIECES[0], *PIECES[6:9]})}


@pytest.mark.parametrize("size", [2, 3, 8, 99])
def test_every_pair_that_may_occurs(size: int) -> None:
    sets = covering(PIECES, CONFLICTS, size)
    check_cover(PIECES, CONFLICTS, sets)
    assert max(map(len, sets)) <= size and sets == covering(PIECES, CONFLICTS, size)
    assert len(pairs(PIECES, CONFLICTS)) == 14 * 13 // 2 - 2  # the two of a place, and the conflict of two
    assert len(sets) < len(pairs(PIECES, CONFLICTS)) / 4 or size < 8


def test_a_piece_that_fits_to_none_stands_alone() -> None:
    pieces = PIECES[:3]
    apart = {frozenset((pieces[0], other)) for other in pieces[1:]}
    assert covering(pieces, apart) == [tuple(pieces[1:]), (pieces[0],)]


def test_a_missing_pair_is_noticed() -> None:
    sets = covering(PIECES, CONFLICTS, 2)
    with pytest.raises(AssertionError):
        check_cover(PIECES, CONFLICTS, sets[1:])
    with pytest.raises(AssertionError):
        check_cover(PIECES, CONFLICTS, [*sets, PIECES[3:6]])
    with pytest.raises(AssertionError, match="no such piece"):
        check_cover(PIECES, {*CONFLICTS, frozenset({("list-0", "gone"), PIECES[0]})}, sets)


def test_pieces_of_a_list_stand_in_one_list() -> None:
    assert lists([("a", "x"), ("b", "y"), ("a", "z")]) == {"a": "x,z", "b": "y"}


@pytest.mark.parametrize(
    ("guilty", "said"),
    [
        ("2", r"These fail alone:\n  list-2=2: ValueError: 2 is there$"),
        ("14", r"These pairs fail:\n  list-1=1\+list-1=4: ValueError: 14 is there$"),
        ("1234", r"Every pair of them passes"),
    ],
)
def test_a_failure_names_who_is_to_blame(guilty: str, said: str) -> None:
    def attempt(pieces: Sequence[Piece]) -> None:
        if set(guilty) <= {name for _, name in pieces}:
            raise ValueError(f"{guilty} is there")

    with pytest.raises(AssertionError, match=said):
        together(PIECES[1:5], attempt)
    together(PIECES[5:8], attempt)
