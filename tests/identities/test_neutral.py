"""Invariant 2: a method at its neutral setting equals the method left out; singly, in pairs, all together."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
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
    "front.edits": {"prompts": {"front.prompts.count": 0}},
    "front.penalties": {},
    "body.edits": {"lora": {}},
    "body.plans": {"knapsack": {"body.knapsack.budget": 1.0}, "layerdrop": {"body.layerdrop.rate": 0.0}},
    "share.merge": {"fedavg": {}, "uniform": {}},
    "share.proximal": {"fedprox": {"share.fedprox.mu": 0.0}},
    "share.partial": {"ptls": {"share.ptls.keep": 1.0}},
    "control.tune": {"bandit": {"control.bandit.rates": "0"}},
    "optimizer.schedule": {"constant": {}, "cosine": {"control.cosine.floor": 1.0}},
    **{place.key: {"half": None} for place in PLACES if place.key.startswith("wire.")},
}
SETTINGS = [
    (key, name, values) for key, pieces in NEUTRAL.items() for name, values in pieces.items() if values is not None
]
TRAIN = "head,norms"


def trained(config: Config) -> Tensors:
    built = world(config)
    return tensors_of(client_round(built, job_of(built)))


def with_pieces(chosen: list[tuple[str, str, dict[str, Scalar]]]) -> Config:
    changes: dict[str, Scalar] = {}
    for key, name, values in chosen:
        changes |= {key.replace(".", "__"): name}
        changes |= {name.replace(".", "__"): value for name, value in values.items()}
    return small(train=TRAIN, local__max_steps=2, **changes)


@pytest.fixture(scope="module")
def absent() -> Tensors:
    return trained(small(train=TRAIN, local__max_steps=2))


def test_every_piece_says_what_is_neutral() -> None:
    for place in PLACES:
        assert set(NEUTRAL[place.key]) == set(place.pieces), f"say in NEUTRAL what switches a piece of {place.key} off"


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: f"{setting[0]}={setting[1]}")
def test_neutral_equals_absent(setting: tuple[str, str, dict[str, Scalar]], absent: Tensors) -> None:
    same(trained(with_pieces([setting])), absent)


PAIRS = [(a, b) for a, b in combinations(SETTINGS, 2) if a[0] != b[0]]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "+".join(setting[1] for setting in pair))
def test_neutral_pairs_equal_absent(pair: tuple[tuple[str, str, dict[str, Scalar]], ...], absent: Tensors) -> None:
    same(trained(with_pieces(list(pair))), absent)


def test_all_neutral_pieces_together_equal_absent(absent: Tensors) -> None:
    last = {key: (key, name, values) for key, name, values in SETTINGS}
    same(trained(with_pieces(list(last.values()))), absent)


def same(one: Tensors, other: Tensors) -> None:
    assert set(one) == set(other)
    for name, value in other.items():
        assert torch.equal(one[name], value), name
