"""Prompts: where they sit, what pooling makes of them, and that only they move when only they train."""

from __future__ import annotations

import pytest
import torch
from small import job_of, model, small, tensors_of
from test_split import NOISY, same_as_unsplit, sgd

from fedsplit.client import client_round
from fedsplit.config import Config
from fedsplit.front import models
from fedsplit.front.prompts import Prompts
from fedsplit.settings import Model
from fedsplit.types import Cut, Scalar
from fedsplit.world import world

ON: dict[str, Scalar] = {"front__edits": "prompts", "front__prompts__count": 3, "front__prompts__dropout": 0.2}


@pytest.mark.parametrize("kind, front", [("cls", 0), ("cls", 5), ("avg", 0), ("avg", 3)])
def test_split_equals_unsplit_with_prompts(kind: str, front: int) -> None:
    config = model(kind, **NOISY, **ON, cut__front=front, train="tail,prompts", local__max_steps=3)
    same_as_unsplit(config, sgd(config))


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", "vit_wee_patch16_reg1_gap_256", "vit_base_patch32_clip_224"]
)
def test_several_prefix_tokens_and_pre_norm(name: str) -> None:
    kwargs = {**NOISY, **ON, "cut__front": 2, "train": "tail,prompts", "local__max_steps": 1}
    config = model("cls", **{**kwargs, "model__name": name, "model__image_size": 64, "local__batch_size": 4})
    same_as_unsplit(config, sgd(config))


def moved(config: Config) -> list[str]:
    built = world(config)
    old = {name: value.clone() for name, value in built.model_state().items()}
    built.load(built.initial)
    client_round(built, job_of(built))
    return [name for name, value in built.model_state().items() if not torch.equal(value, old[name])]


def test_only_the_prompts_move_and_their_gradient_crosses_the_wire() -> None:
    config = small(**ON, train="prompts", local__max_steps=1)
    assert moved(config) == ["norm_pre.prompts"]
    built = world(config)
    counted = client_round(built, job_of(built)).report.bytes
    assert counted["gradients-up"] > 0 and counted["gradients-down"] > 0
    plain = client_round(world(small(local__max_steps=1)), job_of(world(small(local__max_steps=1)))).report.bytes
    assert counted["activations-up"] - plain["activations-up"] == 8 * 3 * 96 * 4, "three more tokens of 96 floats"


def test_prompts_and_lora_train_together() -> None:
    names = moved(small(**ON, body__edits="lora", train="prompts,lora", local__max_steps=2))
    assert "norm_pre.prompts" in names and any("lora_B" in name for name in names)
    assert all("prompt" in name or "lora_" in name for name in names)


def test_average_pooling_leaves_the_prompts_out() -> None:
    vit = models.create(Model(), 10, 0).vit
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        prompted = Prompts(count=4).edit(vit, Cut(0, 0, 8), 1).eval()
        tokens = prompted.forward_features(x)
        assert tokens.shape == (2, 68, 96)
        wanted = prompted.head(prompted.fc_norm(tokens[:, 4:].mean(1)))
        assert torch.allclose(prompted.forward_head(tokens), wanted, atol=1e-6)


def test_prompts_are_drawn_from_their_own_stream_within_their_bound() -> None:
    one, two, other = (
        Prompts(count=6).edit(models.create(Model(), 10, 0).vit, Cut(0, 0, 8), stream).norm_pre.prompts
        for stream in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)
    bound = (6 / (3 * 16 + 96)) ** 0.5
    assert 0.8 * bound < one.abs().max() <= bound


def test_the_cut_does_not_change_what_prompts_learn() -> None:
    one, two = (
        tensors_of(client_round(world(config), job_of(world(config))))
        for config in (small(**ON, cut__front=front, train="prompts,head", local__max_steps=2) for front in (0, 4))
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
