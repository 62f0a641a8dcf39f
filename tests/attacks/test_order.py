"""Shuffled tokens: an attacker who knows the front puts them in order where they tell their places, and only there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_learned import AUXILIARY, VICTIMS, asks, identity, mse, saw, shuffled

from fedsplit.attacks import ATTACKS
from fedsplit.attacks.base import Knowledge, Transcript
from fedsplit.attacks.learned import asked
from fedsplit.attacks.order import chosen, in_order, learned, placed
from fedsplit.attacks.work import Work
from fedsplit.rng import torch_rng

PLACES = torch.randn(16, 48, generator=torch_rng(1))
ORDER = torch.rand(5, 16, generator=torch_rng(3)).argsort(1)


def told(images: Tensor) -> Tensor:
    """What `shuffled` sends, in order: every token says where it came from."""
    return identity(images, 0) + PLACES


def silent(images: Tensor, key: int) -> Tensor:
    """Patches in an order of their own, without a word of their places."""
    tokens = identity(images, key)
    order = torch.rand(tokens.shape[:2], generator=torch_rng(key)).argsort(1)
    return tokens.gather(1, order[..., None].expand_as(tokens))


def mixed(tokens: Tensor) -> Tensor:
    return tokens.gather(1, ORDER[..., None].expand_as(tokens))


def run(name: str, transcript: Transcript, knowledge: Knowledge, **how: Any) -> Tensor:
    found: Tensor = ATTACKS[name](**{"epochs": 4, "width": 32, **how}).run(transcript, knowledge, 0, Work())
    return found


def test_the_best_pairs_are_taken_and_each_token_once() -> None:
    scores = torch.tensor([[[3.0, 9.0, 0.0], [2.0, 8.0, 1.0], [7.0, 6.0, 5.0]]])
    assert chosen(scores).tolist() == [[2, 0, 1]]
    drawn = torch.rand(4, 16, 16, generator=torch_rng(0))
    assert torch.equal(chosen(drawn).sort(1).values, torch.arange(16).expand(4, 16))


@pytest.mark.parametrize("prefix", [0, 2])
def test_scores_that_know_the_order_undo_it(prefix: int) -> None:
    first, patches = torch.randn(5, prefix, 48, generator=torch_rng(4)), told(AUXILIARY[:5])
    seen = torch.cat([first, mixed(patches)], 1)
    scores = torch.nn.functional.one_hot(ORDER, 16).float()
    assert torch.equal(placed(seen, scores, prefix), torch.cat([first, patches], 1))


def test_queries_are_put_in_the_order_of_the_known_front() -> None:
    ask = in_order(shuffled, told, 0)
    assert torch.equal(ask(AUXILIARY[:5], 8), told(AUXILIARY[:5]))
    assert not torch.equal(shuffled(AUXILIARY[:5], 8), told(AUXILIARY[:5]))


def test_places_are_learned_where_tokens_tell_them() -> None:
    for front, right in ((told, 1.0), (lambda images: identity(images, 0), 0.3)):
        order = learned(front(AUXILIARY), 0, 4, 32, 32, 0, Work())
        ours = mixed(front(VICTIMS[:5]))
        close = (order(ours) == front(VICTIMS[:5])).all(2).float().mean()
        assert (order.right > 0.99 and close > 0.99) if right == 1.0 else (order.right < right)


@pytest.mark.parametrize("name", ["inverse-net", "averaged"])
def test_who_knows_the_front_sees_through_the_shuffle(name: str) -> None:
    known = replace(asks(shuffled), front=told)
    plain = replace(asks(lambda images, key: told(images)), front=told)
    through = mse(run(name, saw(shuffled, 2), known))
    assert through < 0.2 * mse(run(name, saw(shuffled, 2), asks(shuffled)))
    assert through < 2 * mse(run(name, saw(lambda images, key: told(images), 2), plain))


def test_tokens_without_places_are_left_to_slots() -> None:
    known = replace(asks(silent), front=lambda images: identity(images, 0))
    found = run("inverse-net", saw(silent), known)
    assert torch.equal(found, run("inverse-net", saw(silent), known, decoder="slots"))


def test_rescaling_changes_nothing() -> None:
    def scaled(images: Tensor, key: int) -> Tensor:
        return 4 * shuffled(images, key)

    found = run("inverse-net", saw(shuffled), replace(asks(shuffled), front=told))
    again = run("inverse-net", saw(scaled), replace(asks(scaled), front=lambda images: 4 * told(images)))
    assert torch.equal(found, again)


def test_without_images_to_hold_out_nothing_is_trusted() -> None:
    tokens = asked(in_order(shuffled, told, 0), AUXILIARY[:1], 0)
    assert learned(tokens, 0, 1, 32, 32, 0, Work()).right == 0.0
