"""Invariants 1, 3 and 8: the split changes where things are computed, never what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import job_of, model, small, tensors_of, unsplit

from fedsplit.client import client_round
from fedsplit.config import Config
from fedsplit.front.trainable import WORDS
from fedsplit.types import Op, Plan, Scalar
from fedsplit.world import world

NOISY: dict[str, Scalar] = {"model__dropout": 0.1, "model__drop_path": 0.2, "cut__shape": "u-shape"}


def sgd(config: Config) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=config.optimizer.lr, momentum=config.optimizer.momentum)


def same_as_unsplit(config: Config, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    before = unsplit(config, make)  # first: it copies the model before training changes it
    built = world(config)
    update = client_round(built, job_of(built))
    mean = sum(before.losses) / len(before.losses)
    assert update.report.steps == len(before.losses) > 0
    assert update.report.train_loss == pytest.approx(mean, abs=1e-12)
    trained = tensors_of(update)
    reference = dict(before.vit.named_parameters())
    assert set(trained) == set(built.trains.names)
    for name, value in trained.items():
        assert torch.equal(value, reference[name]), name
    now = {name: p.grad for name, p in {**built.client, **built.server}.items() if p.grad is not None}
    assert set(now) == set(before.gradients)
    for name, gradient in now.items():
        assert torch.equal(gradient, before.gradients[name]), name


@pytest.mark.parametrize("front", range(12))
def test_split_equals_unsplit_at_every_cut_of_a_cls_model(front: int) -> None:
    config = model("cls", **NOISY, cut__front=front, cut__tail=min(front // 2, 11 - front))
    same_as_unsplit(config, sgd(config))


@pytest.mark.parametrize("front", range(8))
@pytest.mark.parametrize("tail", [0, 3])
def test_split_equals_unsplit_at_every_cut_of_an_average_pooled_model(front: int, tail: int) -> None:
    if front + tail > 7:
        tail = 7 - front
    config = model("avg", **NOISY, cut__front=front, cut__tail=tail, local__max_steps=5)
    same_as_unsplit(config, sgd(config))


@pytest.mark.parametrize("shape", ["vanilla", "none"])
def test_vanilla_and_no_split_equal_unsplit(shape: str) -> None:
    config = model("avg", **{**NOISY, "cut__shape": shape})
    same_as_unsplit(config, sgd(config))


def test_distilled_model_splits() -> None:
    config = model("cls", **NOISY, model__name="deit_tiny_distilled_patch16_224", cut__front=3, local__max_steps=2)
    same_as_unsplit(config, sgd(config))


def test_register_tokens_split() -> None:
    name = "vit_wee_patch16_reg1_gap_256"
    config = model("cls", **NOISY, model__name=name, cut__front=3, local__max_steps=2)
    same_as_unsplit(config, sgd(config))


def test_split_equals_unsplit_with_adamw() -> None:
    config = small(**NOISY, optimizer__name="adamw", optimizer__lr=1e-3, optimizer__weight_decay=0.05)
    same_as_unsplit(config, lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05))


@pytest.mark.parametrize("train", ["tail", "head", "body", "front", "norms", "biases", "front,tail", "body,head"])
def test_partial_training_equals_unsplit(train: str) -> None:
    config = small(train=train, cut__shape="u-shape", cut__front=2, cut__tail=1, local__max_steps=2)
    same_as_unsplit(config, sgd(config))


@pytest.mark.parametrize("word", [word for word in WORDS if word != "prompts"])
@pytest.mark.parametrize("shape", ["u-shape", "vanilla"])
def test_only_what_train_names_changes(word: str, shape: str) -> None:
    edits = {"body__edits": "lora"} if word == "lora" else {}
    config = small(train=word, cut__shape=shape, local__max_steps=2, **edits)
    built = world(config)
    old = built.model_state()
    old = {name: value.clone() for name, value in old.items()}
    update = client_round(built, job_of(built))
    trained = tensors_of(update)
    assert set(trained) == set(built.trains.names)
    for name, value in built.model_state().items():
        if name in trained:
            continue
        assert torch.equal(value, old[name]), name
    moved = [name for name, value in trained.items() if not torch.equal(value, old[name])]
    assert moved


def test_two_tensors_cross_the_wire_when_only_the_tail_trains() -> None:
    built = world(small(train="tail", local__max_steps=1))
    counted = client_round(built, job_of(built)).report.bytes
    assert counted["gradients-up"] == counted["gradients-down"] == 0
    assert counted["activations-up"] == counted["activations-down"] > 0


def test_skipped_and_forward_blocks() -> None:
    built = world(small())
    body = built.parts.body
    x = torch.randn(2, 64, 96, requires_grad=True)
    assert torch.equal(body(x, None, Plan(((Op.FULL,),) * 8)), body(x))
    assert torch.equal(body(x, None, Plan(((Op.SKIP,),) * 8)), x)
    out = body(x, None, Plan(((Op.FORWARD,),) * 8))
    assert torch.allclose(out, body(x), atol=1e-5)
    out.sum().backward()
    assert all(p.grad is None for p in body.named().values())
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))
