"""Guards: what they send, in training and in evaluation, and that the rest of the system knows of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small import job_of, model, small, tensors_of
from test_split import NOISY, same_as_unsplit, sgd
from torch import Tensor, nn

from fedsplit.client import client_round
from fedsplit.experiment import check
from fedsplit.front import EDITS, models
from fedsplit.front.bottleneck import Bottleneck
from fedsplit.front.feature_dropout import Drop, FeatureDropout
from fedsplit.front.guard import Guard, quiet
from fedsplit.front.merge import Merge
from fedsplit.front.noise import AddNoise, Noise
from fedsplit.front.prompts import Prompts
from fedsplit.front.quantize import Quantize, Round
from fedsplit.front.shuffle import Permute, Shuffle
from fedsplit.front.vit import Parts, split
from fedsplit.settings import Model
from fedsplit.types import Cut, FedsplitError, Op, Plan, Scalar
from fedsplit.world import world

GUARDS = tuple(name for name in EDITS if name != "prompts")
RANDOM = ("noise", "feature-dropout", "shuffle")
NEUTRAL = (
    Noise(scale=0.0),
    FeatureDropout(keep=1.0),
    Shuffle(fraction=0.0),
    Quantize(bits=32),
    Bottleneck(rank=0),
    Merge(window=1),
)
NANO: dict[str, Scalar] = {"model__name": "fedsplit_nano", "model__pretrained": False, "cut__front": 1}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def parts_with(*pieces: Any, front: int = 2, **settings: Any) -> Parts:
    """A small average-pooled model cut behind `front` blocks, with `pieces` put in; in training mode."""
    made = models.create(Model(**settings), 10, 0)
    cut, vit = Cut(front, 0, made.depth), made.vit
    for place, piece in enumerate(pieces):
        vit = piece.edit(vit, cut, 7 + place)
    parts = split(vit, cut)
    parts.train()
    return parts


def test_a_neutral_guard_is_no_guard() -> None:
    vit = models.create(Model(), 10, 0).vit
    before = list(vit.state_dict())
    for piece in NEUTRAL:
        assert piece.edit(vit, Cut(2, 0, 8), 1) is vit
    assert list(vit.state_dict()) == before and not hasattr(vit, "guard")
    assert len(NEUTRAL) == len(GUARDS)


@pytest.mark.parametrize("kind, kurtosis", [("gaussian", 3.0), ("laplace", 6.0)])
@pytest.mark.parametrize("relative", [True, False])
def test_noise_has_the_stated_scale(kind: str, kurtosis: float, relative: bool) -> None:
    x = 5.0 * torch.randn(16, 64, 96) + 2.0
    added = AddNoise(Noise(kind, 0.2, relative), 1)(x) - x
    wanted = 0.2 * x.std().item() if relative else 0.2
    assert added.std().item() == pytest.approx(wanted, rel=0.02)
    assert abs(added.mean().item()) < 0.02 * wanted
    assert ((added / added.std()) ** 4).mean().item() == pytest.approx(kurtosis, rel=0.1)


def test_the_scale_of_the_noise_has_no_gradient() -> None:
    x = torch.randn(2, 4, 8, requires_grad=True)
    AddNoise(Noise(scale=1.0), 1)(x).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))


def test_dropout_sends_the_stated_fraction_and_keeps_the_expectation() -> None:
    sent = Drop(0.7, 1)(torch.ones(16, 64, 96))
    assert (sent != 0).float().mean().item() == pytest.approx(0.7, abs=0.01)
    assert torch.allclose(sent[sent != 0], torch.tensor(1 / 0.7)) and sent.mean().item() == pytest.approx(1, abs=0.01)


def test_every_sample_has_a_permutation_of_its_own_and_keeps_its_prefix() -> None:
    x = torch.arange(4 * 20 * 3.0).view(4, 20, 3)
    sent = Permute(1.0, 16, 1)(x)
    assert torch.equal(sent[:, :4], x[:, :4])
    assert torch.equal(sent[:, 4:].sort(1).values, x[:, 4:]), "whole tokens, each once"
    orders = ((sent - x[:, :1])[:, 4:, 0] / 3).round().int()
    assert len({tuple(order.tolist()) for order in orders}) == 4


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_only_a_fraction_of_the_patches_changes_places(fraction: float) -> None:
    x = torch.arange(100 * 3.0).view(1, 100, 3).repeat(5, 1, 1)
    moved = (Permute(fraction, 100, 1)(x) != x).all(2).sum(1)
    assert (moved <= 100 * fraction).all() and (moved >= 100 * fraction - 6).all()


@pytest.mark.parametrize("first", [True, False])
def test_prompts_are_not_shuffled_whichever_comes_first(first: bool) -> None:
    prompts = Prompts(count=3, at="cut")
    parts = parts_with(*([Shuffle(), prompts] if first else [prompts, Shuffle()]))
    with torch.no_grad():
        sent = parts.front(IMAGES)
        with quiet(parts.front):
            plain = parts.front(IMAGES)
    assert parts.front.prefix == 3 and torch.equal(sent[:, :3], plain[:, :3])
    assert not torch.equal(sent, plain) and torch.equal(sent.sort(1).values, plain.sort(1).values)


@pytest.mark.parametrize("kind", ["avg", "cls"])
def test_shuffling_changes_no_logits(kind: str) -> None:
    name = "vit_tiny_patch16_224" if kind == "cls" else "fedsplit_micro"
    parts = parts_with(Shuffle(), name=name, image_size=32, pretrained=kind == "avg")
    parts.train(False)
    with torch.no_grad():
        shuffled = parts(IMAGES)
        with quiet(parts.front):
            plain = parts(IMAGES)
    assert torch.allclose(shuffled, plain, atol=1e-4)
    assert kind == "cls" or not torch.equal(shuffled, plain), "sums in another order: something was shuffled"


@pytest.mark.parametrize("bits", [1, 3, 8, 20])
@pytest.mark.parametrize("span", ["minmax", "absmax"])
def test_quantisation_is_off_by_half_a_step_at_most(bits: int, span: str) -> None:
    x = torch.randn(2, 5, 96).requires_grad_()
    sent = Round(bits, span)(x)
    wide = x.amax(-1) - x.amin(-1) if span == "minmax" else 2 * x.abs().amax(-1)
    step = (wide / (2**bits - 1))[..., None]
    assert ((sent - x).abs() <= step / 2 + 1e-6).all()
    assert all(len(token.unique()) <= 2**bits for token in sent.flatten(0, 1))
    weight = torch.randn_like(x)
    (sent * weight).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weight), "the gradient passes straight through"


def test_a_constant_token_stays_what_it_is() -> None:
    for span in ("minmax", "absmax"):
        assert torch.equal(Round(4, span)(torch.zeros(1, 2, 8)), torch.zeros(1, 2, 8))
    assert torch.equal(Round(4, "minmax")(torch.full((1, 2, 8), 0.3)), torch.full((1, 2, 8), 0.3))


def test_the_bottleneck_projects_on_its_basis() -> None:
    narrow, whole = parts_with(Bottleneck(rank=24)), parts_with(Bottleneck(rank=96))
    plain = parts_with()
    with torch.no_grad():
        h = plain.front(IMAGES)
        assert narrow.front(IMAGES).shape == (3, 64, 24)
        basis = narrow.front.named()["guard.bottleneck.basis"]
        assert torch.allclose(basis.T @ basis, torch.eye(24), atol=1e-5)
        back = next(iter(narrow.body.stages(narrow.front(IMAGES))))
        assert torch.allclose(back, h @ basis @ basis.T, atol=1e-3)
        assert torch.allclose(whole(IMAGES), plain(IMAGES), atol=1e-3), "a rotation and back"
    assert "unguard.bottleneck.basis" in narrow.body.named() and "unguard.bottleneck.basis" not in narrow.front.named()
    assert "guard.bottleneck.basis" not in narrow.body.named()


@pytest.mark.parametrize("edits", ["bottleneck", "noise,bottleneck", "bottleneck,quantize,noise"])
def test_the_bottleneck_narrows_the_wire(edits: str) -> None:
    built = world(small(**NANO, train="front", local__max_steps=1, front__edits=edits, front__bottleneck__rank=24))
    sent = client_round(built, job_of(built)).report.bytes
    values = 8 * 64 * 48 * 4
    for stream in ("activations-up", "activations-down", "gradients-up", "gradients-down"):
        wanted = values * 24 // 48 if stream in ("activations-up", "gradients-down") else values
        assert 0 < sent[stream] - wanted < 100, stream


@pytest.mark.parametrize("train, front, body", [("all", 3, 3), ("head,norms", 2, 2), ("body", 1, 2)])
def test_the_flops_of_the_bottleneck_are_its_products(train: str, front: int, body: int) -> None:
    """`front` and `body` products of (64, 48) and (48, 32): forward, gradient of the input, of the basis."""
    wide = world(small(**NANO, train=train)).flops
    flops = world(small(**NANO, train=train, front__edits="bottleneck")).flops
    one = 2 * 64 * 48 * 32
    assert (flops.front - wide.front, flops.body - wide.body) == (front * one, body * one)


@pytest.mark.parametrize("train, up", [("all", 3), ("body", 2)])
def test_plans_know_that_a_trained_half_waits_below_the_first_block(train: str, up: int) -> None:
    built = world(small(**NANO, train=train, front__edits="bottleneck"))
    _, server = built.plan_flops.spared(Plan(((Op.SKIP,),) * 3))
    assert built.flops.body - server == up * 2 * 64 * 48 * 32, "all that the body does besides its blocks"
    assert built.plan_flops._starts[1], "which tells in blocks without a norm at their input"


def test_merged_tokens_are_means_of_their_window() -> None:
    merged, plain = parts_with(Prompts(count=3, at="cut"), Merge(window=4)), parts_with(Prompts(count=3, at="cut"))
    with torch.no_grad():
        sent, whole = merged.front(IMAGES), plain.front(IMAGES)
    assert sent.shape == (3, 3 + 4, 96) and torch.equal(sent[:, :3], whole[:, :3])
    grid = whole[:, 3:].unflatten(1, (8, 8))
    for number, token in enumerate(sent[:, 3:].unbind(1)):
        top, left = 4 * (number // 2), 4 * (number % 2)
        assert torch.allclose(token, grid[:, top : top + 4, left : left + 4].mean((1, 2)), atol=1e-5)
    both = parts_with(Merge(window=2), Shuffle())
    with torch.no_grad():
        shuffled = both.front(IMAGES)
        with quiet(both.front):
            ordered = both.front(IMAGES)
    assert torch.equal(shuffled.sort(1).values, ordered.sort(1).values) and not torch.equal(shuffled, ordered)
    with pytest.raises(FedsplitError, match=r"front\.merge\.window=3 does not tile the 8 x 8 patch tokens"):
        parts_with(Merge(window=3))


def test_merging_shrinks_the_wire_and_the_bodys_compute() -> None:
    keys: dict[str, Scalar] = {**NANO, "train": "all", "local__max_steps": 1}
    built, whole = world(small(**keys, front__edits="merge")), world(small(**keys)).flops
    sent = client_round(built, job_of(built)).report.bytes
    for stream in ("activations-up", "activations-down", "gradients-up", "gradients-down"):
        assert 0 < sent[stream] - 8 * 16 * 48 * 4 < 100, stream
    assert built.flops.body < whole.body / 4 and built.flops.front == whole.front
    client, server = built.plan_flops.spared(Plan(((Op.SKIP,),) * 3))
    assert (client, server) == (built.plan_flops._whole["client"], built.flops.body), "plans count the same tokens"


def test_each_half_of_the_bottleneck_trains_at_its_side() -> None:
    built = world(small(**NANO, front__edits="bottleneck", train="front"))
    assert "guard.bottleneck.basis" in built.client and not built.server
    built = world(small(**NANO, front__edits="bottleneck", train="body"))
    assert "unguard.bottleneck.basis" in built.server and not built.client
    before = built.initial["unguard.bottleneck.basis"]
    built.load(built.initial)
    moved = tensors_of(client_round(built, job_of(built)))["unguard.bottleneck.basis"]
    assert not torch.equal(moved, before)


def test_a_client_alone_reads_through_a_frozen_bottleneck() -> None:
    alone: dict[str, Scalar] = {"local__phases": "self-update", "data__select": "el2n,prototype", "train": "tail"}
    found = [
        world(small(**alone, **more)) for more in ({}, {"front__edits": "bottleneck", "front__bottleneck__rank": 96})
    ]
    with torch.no_grad():
        plain, narrow = (built.short(built.parts.front(IMAGES)) for built in found)
    assert torch.allclose(plain, narrow, atol=1e-3)
    built = world(small(**alone, front__edits="bottleneck", local__self_update__epochs=1, local__max_steps=1))
    assert client_round(built, job_of(built)).report.local_steps > 0
    for keys in ({"local__phases": "self-update"}, {"data__select": "el2n", "data__el2n__keep": 0.5}):
        config = small(**NANO, **keys, front__edits="bottleneck", train="all")
        with pytest.raises(FedsplitError, match=r"front\.bottleneck: train='all' trains the server's half"):
            check(config, world(config))


@pytest.mark.parametrize(
    "front, edits, prompts",
    [
        (0, "noise,feature-dropout", {}),
        (2, "shuffle,bottleneck,noise,quantize", {}),
        (1, "noise,prompts,shuffle", {"at": "cut"}),
        (1, "bottleneck,shuffle,prompts", {"at": "cut", "side": "server"}),
        (1, "shuffle,merge,prompts,noise", {"at": "cut"}),
    ],
)
def test_split_equals_unsplit_with_guards(front: int, edits: str, prompts: dict[str, Scalar]) -> None:
    """Guards come after the client's prompts and before the server's, in either order of the list."""
    keys = {f"front__prompts__{name}": value for name, value in (prompts | {"dropout": 0.2}).items()}
    config = small(**(NANO | NOISY | keys | {"cut__front": front, "front__edits": edits, "local__max_steps": 2}))
    same_as_unsplit(config, sgd(config))


def test_split_equals_unsplit_with_guards_of_a_class_token() -> None:
    edits = "feature-dropout,bottleneck,shuffle"
    config = model("cls", **NOISY, cut__front=2, cut__tail=1, front__edits=edits, local__max_steps=1)
    same_as_unsplit(config, sgd(config))


@pytest.mark.parametrize("name", GUARDS)
def test_nothing_crosses_without_a_split(name: str) -> None:
    with pytest.raises(FedsplitError, match=f"front.edits={name} guards what crosses the cut.*leave {name} out"):
        parts_with(EDITS[name](), front=8)


def test_a_bottleneck_is_no_wider_than_its_tokens() -> None:
    with pytest.raises(FedsplitError, match="rank=97 is more than the 96 channels"):
        parts_with(Bottleneck(rank=97))


def test_draws_depend_neither_on_the_cut_nor_on_other_draws() -> None:
    masks, orders = [], []
    for front, dropout, others in ((1, 0.0, ()), (3, 0.3, (Noise(scale=1e-3),))):
        dropped, mixed = (
            parts_with(*others, piece, front=front, dropout=dropout) for piece in (FeatureDropout(), Shuffle())
        )
        with torch.no_grad():
            masks.append(dropped.front(IMAGES, 5) == 0)
            sent = mixed.front(IMAGES, 5)
            with quiet(mixed.front):
                orders.append(torch.cdist(sent, mixed.front(IMAGES, 5)).argmin(2))
    assert torch.equal(*masks) and torch.equal(*orders)


@pytest.mark.parametrize("piece", [Noise(), FeatureDropout(), Shuffle()])
def test_uploads_differ_in_training_and_evaluation_is_decided(piece: Any) -> None:
    parts = parts_with(piece)
    with torch.no_grad():
        one, again, other = (parts.front(IMAGES, noise) for noise in (1, 1, 2))
        assert torch.equal(one, again) and not torch.equal(one, other)
        parts.train(False)
        before = torch.get_rng_state()
        first, second = parts.front(IMAGES), parts.front(IMAGES, 3)
        with quiet(parts.front):
            plain = parts.front(IMAGES)
    assert torch.equal(first, second) and not torch.equal(first, plain), "the same noise in evaluation, but noise"
    assert torch.equal(before, torch.get_rng_state())


def test_quiet_is_for_random_guards_alone_and_ends() -> None:
    parts = parts_with(Noise(), FeatureDropout(), Shuffle(), Quantize(bits=2), Bottleneck(rank=24))
    guards = [module for module in parts.front.modules() if isinstance(module, Guard)]
    assert [guard.draws for guard in guards] == [True, True, True, False, False]
    bare = parts_with(Quantize(bits=2), Bottleneck(rank=24))
    bare.front._shell.guard.bottleneck.load_state_dict(parts.front._shell.guard.bottleneck.state_dict())
    x = IMAGES.clone().requires_grad_()
    with quiet(parts.front):
        sent = parts.front(x)
        assert torch.equal(sent, bare.front(IMAGES))
    assert not torch.equal(parts.front(IMAGES), sent) and not any(guard.quiet for guard in guards)
    sent.square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0, "an attacker can differentiate through it"


@pytest.mark.parametrize("name", GUARDS)
def test_only_what_is_not_random_is_kept(name: str) -> None:
    built = world(small(**NANO, front__edits=name, train="tail"))
    assert built.start == ("begun" if name in RANDOM else "cut")
    assert built.parts.front.random == (name in RANDOM)


@pytest.mark.parametrize(
    "changes",
    [
        {"train": "tail", "front__edits": "quantize,bottleneck"},
        {"train": "prompts,head", "front__edits": "noise,prompts,bottleneck", "front__prompts__at": "cut"},
    ],
)
def test_kept_outputs_change_nothing(changes: dict[str, Scalar]) -> None:
    built = world(small(**NANO, local__max_steps=2, **changes))
    assert built.start == ("cut" if changes["train"] == "tail" else "begun")
    kept = tensors_of(client_round(built, job_of(built)))
    computed = world(small(**NANO, local__max_steps=2, front__cache=False, **changes))
    assert computed.start == "images"
    again = tensors_of(client_round(computed, job_of(computed)))
    assert kept.keys() == again.keys() and all(torch.equal(kept[name], again[name]) for name in kept)


def test_a_copy_of_the_model_has_guards_of_its_own() -> None:
    cut = Cut(2, 0, 8)
    vit: Any = Bottleneck(rank=96).edit(models.create(Model(), 10, 0).vit, cut, 1).eval()
    other: Any = copy.deepcopy(vit)
    with torch.no_grad():
        before: Tensor = vit(IMAGES)
        other.guard.bottleneck.basis.zero_()
        assert torch.equal(vit(IMAGES), before) and not torch.equal(other(IMAGES), before)
    assert isinstance(other.guard, nn.Sequential) and other.guard is not vit.guard
