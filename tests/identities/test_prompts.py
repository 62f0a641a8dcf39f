"""Prompts: where they sit, what pooling makes of them, and that only they move when only they train."""

from __future__ import annotations

import pytest
import torch
from small import job_of, model, small, tensors_of
from test_split import NOISY, same_as_unsplit, sgd
from torch import nn

from fedsplit.client import client_round
from fedsplit.config import Config
from fedsplit.experiment import start
from fedsplit.front import models
from fedsplit.front.prompts import Prompts
from fedsplit.front.vit import split
from fedsplit.settings import Model
from fedsplit.types import Cut, FedsplitError, Op, Plan, Scalar, Update
from fedsplit.world import world

ON: dict[str, Scalar] = {"front__edits": "prompts", "front__prompts__count": 3, "front__prompts__dropout": 0.2}
WHERE: dict[str, dict[str, Scalar]] = {
    "input": ON,
    "cut": ON | {"front__prompts__at": "cut"},
    "server": ON | {"front__prompts__at": "cut", "front__prompts__side": "server"},
    "deep": ON | {"front__prompts__deep": True},
}


@pytest.mark.parametrize(
    "where, kind, front, tail",
    [
        ("input", "cls", 0, 0),
        ("input", "cls", 5, 0),
        ("input", "avg", 0, 0),
        ("input", "avg", 3, 0),
        ("cut", "cls", 4, 2),
        ("cut", "avg", 1, 0),
        ("server", "cls", 0, 1),
        ("server", "cls", 4, 0),
        ("server", "avg", 3, 2),
        ("deep", "cls", 0, 2),
        ("deep", "cls", 4, 1),
        ("deep", "avg", 2, 3),
    ],
)
def test_split_equals_unsplit_with_prompts(where: str, kind: str, front: int, tail: int) -> None:
    more: dict[str, Scalar] = {"cut__front": front, "cut__tail": tail, "train": "tail,prompts", "local__max_steps": 3}
    config = model(kind, **NOISY, **WHERE[where], **more)
    same_as_unsplit(config, sgd(config))


@pytest.mark.parametrize("where, shape", [("server", "vanilla"), ("deep", "vanilla"), ("deep", "none")])
def test_split_equals_unsplit_when_all_trains(where: str, shape: str) -> None:
    front = 0 if shape == "none" else 2
    config = small(**(NOISY | WHERE[where] | {"cut__shape": shape, "cut__front": front, "local__max_steps": 2}))
    same_as_unsplit(config, sgd(config))


@pytest.mark.parametrize(
    "name, where",
    [
        ("deit_tiny_distilled_patch16_224", "input"),
        ("deit_tiny_distilled_patch16_224", "cut"),
        ("vit_wee_patch16_reg1_gap_256", "input"),
        ("vit_wee_patch16_reg1_gap_256", "server"),
        ("vit_wee_patch16_reg1_gap_256", "deep"),
        ("vit_base_patch32_clip_224", "input"),
    ],
)
def test_several_prefix_tokens_and_pre_norm(name: str, where: str) -> None:
    kwargs = {**NOISY, **WHERE[where], "cut__front": 2, "train": "tail,prompts", "local__max_steps": 1}
    config = model("cls", **{**kwargs, "model__name": name, "model__image_size": 64, "local__batch_size": 4})
    same_as_unsplit(config, sgd(config))


@pytest.mark.parametrize("where", WHERE)
def test_no_prompts_equal_prompts_left_out(where: str) -> None:
    cut: dict[str, Scalar] = {"cut__front": 2, "cut__tail": 1, "train": "head,norms", "local__max_steps": 2}
    absent = tensors_of(one_round(small(**cut)))
    none = tensors_of(one_round(small(**(WHERE[where] | cut | {"front__prompts__count": 0}))))
    assert none.keys() == absent.keys()
    assert all(torch.equal(none[name], absent[name]) for name in absent)


def one_round(config: Config) -> Update:
    built = world(config)
    return client_round(built, job_of(built))


def moved(config: Config) -> list[str]:
    built = world(config)
    old = {name: value.clone() for name, value in built.model_state().items()}
    built.load(built.initial)
    client_round(built, job_of(built))
    return [name for name, value in built.model_state().items() if not torch.equal(value, old[name])]


@pytest.mark.parametrize(
    "where, front, names",
    [
        ("input", 0, ["norm_pre.prompt.tokens"]),
        ("input", 2, ["norm_pre.prompt.tokens"]),
        ("cut", 2, ["blocks.1.prompt_after.tokens"]),
        ("server", 2, ["blocks.2.prompt_before.tokens"]),
        ("deep", 2, ["norm_pre.prompt.tokens", *(f"blocks.{i}.prompt_before.tokens" for i in range(1, 8))]),
    ],
)
def test_only_the_prompts_move(where: str, front: int, names: list[str]) -> None:
    config = small(**WHERE[where], train="prompts", cut__front=front, cut__tail=1, local__max_steps=1)
    assert sorted(moved(config)) == sorted(names)
    assert set(names) <= set(start(world(config)).model), "what a checkpoint keeps"


def test_each_side_trains_the_prompts_of_its_blocks() -> None:
    deep = world(small(**WHERE["deep"], train="prompts", cut__shape="u-shape", cut__front=2, cut__tail=1))
    assert set(deep.server) == {f"blocks.{number}.prompt_before.tokens" for number in range(2, 7)}
    assert set(deep.client) == {"norm_pre.prompt.tokens", *(f"blocks.{i}.prompt_before.tokens" for i in (1, 7))}
    server = world(small(**WHERE["server"], train="prompts", cut__front=0))
    assert not server.client and set(server.server) == {"blocks.0.prompt_before.tokens"}


@pytest.mark.parametrize("front", [0, 2])
@pytest.mark.parametrize("train", ["prompts", "prompts,tail"])
def test_the_ledger_follows_the_side(front: int, train: str) -> None:
    cut: dict[str, Scalar] = {"cut__shape": "u-shape", "cut__front": front, "train": train, "local__max_steps": 1}
    plain = one_round(small(**(cut | {"train": "tail"}))).report.bytes
    more = 8 * 3 * 96 * 4  # three more tokens of 96 floats
    for where in WHERE:
        got = one_round(small(**WHERE[where], **cut)).report.bytes
        at_server = where == "server"
        up = got["activations-up"] - plain["activations-up"]
        assert up == (0 if at_server else more), where
        assert got["activations-down"] - plain["activations-down"] == more, where
        assert got["gradients-up"] == got["activations-down"], where
        assert (got["gradients-down"] == 0) == at_server, where


def test_flops_follow_the_side() -> None:
    at_input, at_cut, at_server = (
        world(small(**WHERE[where], train="prompts,head", cut__front=3)).flops.front
        for where in ("input", "cut", "server")
    )
    assert at_server <= at_cut < at_input, "at the cut, the client's blocks see no prompt and run no backward pass"


def test_at_the_cut_of_a_front_without_blocks_is_at_the_input() -> None:
    one, two = (
        tensors_of(one_round(small(**WHERE[where], cut__front=0, train="prompts,head", local__max_steps=2)))
        for where in ("input", "cut")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    server = world(small(**(WHERE["server"] | {"front__prompts__at": "input"}), cut__front=0, train="prompts"))
    assert set(server.server) == {"blocks.0.prompt_before.tokens"}


@pytest.mark.parametrize("where", WHERE)
def test_prompts_and_lora_train_together(where: str) -> None:
    cut: dict[str, Scalar] = {"cut__front": 2, "local__max_steps": 2}
    names = moved(small(**WHERE[where], **cut, body__edits="lora", train="prompts,lora"))
    assert any("prompt" in name for name in names) and any("lora_B" in name for name in names)
    assert all("prompt" in name or "lora_" in name for name in names)
    assert not any("prompt" in name and "lora_" in name for name in names)


@pytest.mark.parametrize("where", ["input", "deep"])
def test_the_cut_does_not_change_what_prompts_learn(where: str) -> None:
    one, two = (
        tensors_of(one_round(small(**WHERE[where], cut__front=front, train="prompts,head", local__max_steps=2)))
        for front in (0, 4)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def prompted(piece: Prompts, cut: Cut, stream: int = 1) -> nn.Module:
    vit = piece.edit(models.create(Model(), 10, 0).vit, cut, stream)
    return vit.eval()


@pytest.mark.parametrize("number", [2, 4, 7])
def test_a_skipped_block_with_deep_prompts_is_an_absent_one(number: int) -> None:
    vit = prompted(Prompts(count=4, deep=True), Cut(0, 0, 8))
    parts = split(vit, Cut(0, 0, 8))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = parts.front(x)
        skipped = parts.body(tokens, None, Plan(tuple((Op.SKIP if i == number else Op.FULL,) for i in range(8))))
        forward = parts.body(tokens, None, Plan(tuple((Op.FORWARD if i == number else Op.FULL,) for i in range(8))))
        full = parts.body(tokens)
        del vit.blocks[number]
        without = vit.blocks(tokens)
    assert torch.equal(skipped[:, 4:], without[:, 4:]), "the next block replaces the prompts, or nobody reads them"
    assert skipped.shape == forward.shape == full.shape and torch.allclose(forward, full, atol=1e-5)


@pytest.mark.parametrize("side", ["client", "server"])
def test_prompts_go_in_around_a_skipped_block(side: str) -> None:
    parts = split(prompted(Prompts(count=4, at="cut", side=side), Cut(2, 0, 8)), Cut(2, 0, 8))
    assert parts.front.prefix == (4 if side == "client" else 0) and parts.body.prefix == parts.tail.prefix == 4
    x = torch.randn(2, 3, 32, 32)
    skip = Plan(((Op.SKIP,),) * 8)
    assert parts.body(parts.front(x, plan=skip), plan=skip).shape == (2, 68, 96)


def test_average_pooling_leaves_the_prompts_out() -> None:
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        vit = prompted(Prompts(count=4), Cut(0, 0, 8))
        tokens = vit.forward_features(x)
        assert tokens.shape == (2, 68, 96)
        wanted = vit.head(vit.fc_norm(tokens[:, 4:].mean(1)))
        assert torch.allclose(vit.forward_head(tokens), wanted, atol=1e-6)


@pytest.mark.parametrize("init, bound", [("vpt", (6 / (3 * 16 + 96)) ** 0.5), ("uniform", 0.1), ("normal", 0.1)])
def test_prompts_are_drawn_from_their_own_stream_within_their_bound(init: str, bound: float) -> None:
    piece = Prompts(6, init=init, deep=True)
    one, two, other = (
        {name: p for name, p in prompted(piece, Cut(0, 0, 8), stream).named_parameters() if "prompt" in name}
        for stream in (1, 1, 2)
    )
    assert len(one) == 8 and len({tuple(tokens.flatten().tolist()) for tokens in one.values()}) == 8
    for name, tokens in one.items():
        assert tokens.shape == (1, 6, 96)
        assert torch.equal(tokens, two[name]) and not torch.equal(tokens, other[name])
        assert 0.5 * bound < tokens.abs().max() <= bound
        if init == "normal":
            assert tokens.std().item() == pytest.approx(0.02, rel=0.15)


def test_prompts_may_start_at_zero() -> None:
    vit = prompted(Prompts(init="zeros"), Cut(0, 0, 8))
    assert not vit.get_parameter("norm_pre.prompt.tokens").any()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"side": "server", "cut.front": 2}, "cut.front=2 the client holds the input of block 0; set .*at=cut"),
        ({"at": "cut", "cut.shape": "none"}, r"front\.prompts\.at=cut needs blocks at the server"),
        ({"side": "server", "cut.shape": "none"}, r"front\.prompts\.side=server needs blocks at the server"),
        ({"deep": True, "at": "cut"}, "deep=true puts prompts into every block.*set front.prompts.at=input"),
        ({"deep": True, "side": "server"}, "deep=true puts prompts into every block"),
    ],
)
def test_impossible_places_are_refused(changes: dict[str, Scalar], sentence: str) -> None:
    keys = {name.replace(".", "__") if "." in name else f"front__prompts__{name}": v for name, v in changes.items()}
    with pytest.raises(FedsplitError, match=sentence) as caught:
        world(small(front__edits="prompts", **keys))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
