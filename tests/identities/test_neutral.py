"""Invariant 2: a method at its neutral setting equals the method left out; singly, in pairs, all together."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from covering import Piece, check_cover, covering, label, lists, together
from small import job_of, small, tensors_of

from fedsplit.client import client_round
from fedsplit.config import Config
from fedsplit.places import PLACES
from fedsplit.types import Scalar, Tensors
from fedsplit.world import world

# The neutral setting of every piece, by list key and name; None where only leaving it out is neutral.
NEUTRAL: dict[str, dict[str, dict[str, Scalar] | None]] = {
    "data.select": {
        name: {f"data.{name}.keep": 1.0} for name in ("random", "el2n", "el2n-balanced", "entropy", "loss", "prototype")
    },
    "local.phases": {"self-update": {"local.self-update.epochs": 0}},
    "front.edits": {
        "prompts": {"front.prompts.count": 0},
        "noise": {"front.noise.scale": 0.0},
        "feature-dropout": {"front.feature-dropout.keep": 1.0},
        "shuffle": {"front.shuffle.fraction": 0.0},
        "quantize": {"front.quantize.bits": 32},
        "bottleneck": {"front.bottleneck.rank": 0},
        "merge": {"front.merge.window": 1},
    },
    "front.penalties": {
        "nopeek": {"front.nopeek.weight": 0.0},
        "lipschitz": {"front.lipschitz.alpha": 0.0},
        "adversary": {"front.adversary.beta": 0.0},
        "linear-adversary": {"front.linear-adversary.weight": 0.0},
    },
    "body.edits": {"lora": {}},
    "body.plans": {"knapsack": {"body.knapsack.budget": 1.0}, "layerdrop": {"body.layerdrop.rate": 0.0}},
    "share.merge": {"fedavg": {}, "uniform": {}},
    "share.proximal": {"fedprox": {"share.fedprox.mu": 0.0}},
    "share.partial": {"ptls": {"share.ptls.keep": 1.0}},
    "control.tune": {
        "bandit": {"control.bandit.rates": "0"},
        "bandwidth": {"control.bandwidth.low": 0.0, "control.bandwidth.high": 0.0},
        "batch-size": {"control.batch-size.low": 8, "control.batch-size.high": 8},
        "by-kind": {"control.by-kind.give": ""},
        "importance": {"control.importance.low": 0.0, "control.importance.high": 0.0},
        "staleness": {"control.staleness.high": 0.0},
    },
    # Who takes part is no part of what a client trains, which is compared here: tests/test_devices.py.
    "devices.availability": dict.fromkeys(("always", "random", "diurnal", "trace")),
    "optimizer.schedule": {"constant": {}, "cosine": {"control.cosine.floor": 1.0}},
    **{
        place.key: {
            "delta": None,  # (x - r) + r is not always x
            "feedback": None,  # it is refused on activations, and its memory would be empty
            "recover": {"wire.recover.keep": 1.0},
            "topk": {"wire.topk.keep": 1.0},
            "token-topk": {"wire.token-topk.keep": 1.0},
            **dict.fromkeys(("sign", "qsgd", "int8", "half", "bfloat16")),
            "zstd": {},
        }
        for place in PLACES
        if place.prefix == "wire"
    },
}
OFF = {(key, name): values for key, its in NEUTRAL.items() for name, values in its.items() if values is not None}
# Pieces that are refused together even when neutral, and why; of three or more, all pairs still run.
APART: dict[frozenset[Piece], str] = {}
# Streams know nothing of each other: each codec stands with the pieces of other places on one of them.
WIRE = {
    ("wire.activations-up", "topk"),
    ("wire.gradients-down", "token-topk"),
    ("wire.parameters-up", "zstd"),
    ("wire.parameters-down", "recover"),
}
PAIRED = [piece for piece in OFF if not piece[0].startswith("wire.") or piece in WIRE]
SETS = covering(PAIRED, APART)
TRAIN = "head,norms"


def trained(config: Config) -> Tensors:
    built = world(config)
    return tensors_of(client_round(built, job_of(built)), built)


def with_pieces(pieces: Collection[Piece]) -> Config:
    changes = lists(pieces)
    for piece in pieces:
        changes |= OFF[piece]
    return small(train=TRAIN, local__max_steps=2, **{name.replace(".", "__"): value for name, value in changes.items()})


@pytest.fixture(scope="module")
def absent() -> Tensors:
    return trained(small(train=TRAIN, local__max_steps=2))


def test_every_piece_says_what_is_neutral() -> None:
    for place in PLACES:
        assert set(NEUTRAL[place.key]) == set(place.pieces), f"say in NEUTRAL what switches a piece of {place.key} off"


@pytest.mark.parametrize("piece", OFF, ids="=".join)
def test_neutral_equals_absent(piece: Piece, absent: Tensors) -> None:
    same(trained(with_pieces([piece])), absent)


@pytest.mark.parametrize("pieces", SETS, ids=label)
def test_neutral_pairs_equal_absent(pieces: tuple[Piece, ...], absent: Tensors) -> None:
    together(pieces, lambda some: same(trained(with_pieces(some)), absent))


def test_the_sets_of_pieces_hold_every_pair() -> None:
    check_cover(PAIRED, APART, SETS)


def test_all_neutral_pieces_together_equal_absent(absent: Tensors) -> None:
    last = {key: (key, name) for key, name in OFF}
    same(trained(with_pieces(last.values())), absent)


def same(one: Tensors, other: Tensors) -> None:
    assert set(one) == set(other)
    for name, value in other.items():
        assert torch.equal(one[name], value), name
