"""Few sets of pieces in which every pair stands together: one run of a set tests all of its pairs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import combinations

from fedsplit.places import PLACES
from fedsplit.types import Scalar

Piece = tuple[str, str]  # a list key and one of its names
Conflict = frozenset[Piece]

SINGLE = {place.key for place in PLACES if place.single}


def covering(pieces: Sequence[Piece], conflicts: Collection[Conflict] = (), size: int = 8) -> list[tuple[Piece, ...]]:
    """Sets of up to `size` pieces in which every piece, and every pair that may stand together, occurs.

    No set holds two pieces of a place that takes one, nor all pieces of one of `conflicts`: a conflict of
    two keeps a pair apart everywhere, one of three leaves its pairs where the third is missing. Greedy, and
    the same for the same arguments.
    """
    waiting = dict.fromkeys(pairs(pieces, conflicts))
    sets: list[tuple[Piece, ...]] = []
    while waiting:
        chosen = sorted(next(iter(waiting)), key=pieces.index)
        while len(chosen) < size:
            gains = {
                piece: sum(frozenset((piece, other)) in waiting for other in chosen)
                for piece in pieces
                if piece not in chosen and _may(frozenset((*chosen, piece)), conflicts)
            }
            best = max(gains, key=lambda piece: gains[piece], default=None)  # of equals the first
            if best is None or not gains[best]:
                break
            chosen.append(best)
        for pair in combinations(chosen, 2):
            waiting.pop(frozenset(pair), None)
        sets.append(tuple(sorted(chosen, key=pieces.index)))
    alone = set(pieces).difference(*sets)
    return sets + [(piece,) for piece in pieces if piece in alone]


def pairs(pieces: Sequence[Piece], conflicts: Collection[Conflict] = ()) -> list[frozenset[Piece]]:
    """The pairs that may stand together."""
    found = (frozenset(pair) for pair in combinations(pieces, 2))
    return [pair for pair in found if _may(pair, conflicts)]


def _may(pieces: frozenset[Piece], conflicts: Collection[Conflict]) -> bool:
    places = [key for key, _ in pieces if key in SINGLE]
    return len(places) == len(set(places)) and not any(conflict <= pieces for conflict in conflicts)


def lists(pieces: Iterable[Piece]) -> dict[str, Scalar]:
    """The list keys of a config that name `pieces`."""
    keys: dict[str, Scalar] = {}
    for key, name in pieces:
        keys[key] = f"{keys[key]},{name}" if key in keys else name
    return keys


def label(pieces: Iterable[Piece]) -> str:
    """`pieces` for the name of a test and for a message."""
    return "+".join(f"{key}={name}" for key, name in pieces)


def together(pieces: Sequence[Piece], attempt: Callable[[Sequence[Piece]], object]) -> None:
    """`attempt` with all pieces of a set; where that fails, the test fails and names who is to blame."""
    try:
        attempt(pieces)
    except Exception as error:
        blamed = _blamed(pieces, attempt)
        raise AssertionError(f"{label(pieces)}: {type(error).__name__}: {error}\n{blamed}") from error


def _blamed(pieces: Sequence[Piece], attempt: Callable[[Sequence[Piece]], object]) -> str:
    for count, what in ((1, "These fail alone"), (2, "These pairs fail")):
        failed = []
        for few in combinations(pieces, count):
            try:
                attempt(few)
            except Exception as error:
                failed.append(f"  {label(few)}: {type(error).__name__}: {error}")
        if failed:
            return "\n".join((f"{what}:", *failed))
    return "Every pair of them passes: more of them fail together. If that is as it should be, say so in the conflicts."


def check_cover(pieces: Sequence[Piece], conflicts: Collection[Conflict], sets: Sequence[Sequence[Piece]]) -> None:
    """Every piece, and every pair that may, stands in a set; no set holds what may not stand together."""
    assert {piece for each in sets for piece in each} == set(pieces)
    assert {frozenset(pair) for each in sets for pair in combinations(each, 2)} == set(pairs(pieces, conflicts))
    assert all(_may(frozenset(each), conflicts) for each in sets)
    strange = {piece for conflict in conflicts for piece in conflict} - set(pieces)
    assert not strange, f"no such piece: {sorted(strange)}"
