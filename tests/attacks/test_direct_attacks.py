"""The attacks without a learned network: they find what there is to find, and nothing where there is nothing."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import Tensor, nn

from fedsplit.attacks import ATTACKS
from fedsplit.attacks.base import KNOWABLE, Knowledge, NotApplicable, Transcript, check
from fedsplit.attacks.patches import patch_side, to_images, to_patches
from fedsplit.attacks.work import Work
from fedsplit.config import keys

SMALL: dict[str, dict[str, Any]] = {"closed-form": {}, "linear": {}, "rmle": {"steps": 150, "tv": 0.0}}
IMAGES = sorted(SMALL)
SHORT = {"rmle": {"steps": 30}}
OURS = [*IMAGES, "labels"]


def attack(name: str, **knobs: Any) -> Any:
    return ATTACKS[name](**{**SMALL.get(name, {}), **knobs})


def found(
    name: str, front: toy.Front, x: Tensor, *, key: int = 0, tokens: int = 0, noise: float = 0.0, **knobs: Any
) -> Tensor:
    uploads = knobs.pop("uploads", 1)
    transcript, knowledge = toy.setting(front, x, tokens, noise, uploads)
    images: Tensor = attack(name, **knobs).run(transcript, knowledge, key, Work())
    assert images.shape == x.shape and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    return images


@pytest.mark.parametrize("name", OURS)
def test_an_attack_is_a_piece_that_says_what_it_needs(name: str) -> None:
    cls = ATTACKS[name]
    assert cls.finds in ("images", "labels") and set(cls.needs) <= set(KNOWABLE)
    for word in ("Paper:", "Place:", "Off:", "Deviates:"):
        assert word in (inspect.getdoc(cls) or "")
    for field in dataclasses.fields(cls):
        assert keys()[f"audit.{name}.{field.name}"].help
    with pytest.raises(NotApplicable, match=f"{name} needs .*{cls.needs[-1]}"):
        check(cls(), name, Knowledge())


@pytest.mark.parametrize("name", IMAGES)
def test_an_identity_front_gives_the_images_away(name: str) -> None:
    x = toy.images(6)
    assert toy.ssim(found(name, toy.identity, x), x) > 0.99


@pytest.mark.parametrize("name", IMAGES)
def test_a_constant_front_gives_no_more_than_the_mean_image(name: str) -> None:
    x = toy.images(6)
    images = found(name, toy.constant, x)
    mean = x.mean(0, keepdim=True).expand_as(x)
    assert (images - x).square().mean() >= (mean - x).square().mean() - 1e-6
    assert toy.ssim(images, x) <= toy.ssim(mean, x) + 0.01


@pytest.mark.parametrize("name", IMAGES)
def test_a_scaled_front_hides_nothing(name: str) -> None:
    x, front, short = toy.images(4), toy.curved(), SHORT.get(name, {})
    plain = found(name, front, x, tokens=1, **short)
    for factor in (2.0**-9, 2.0**12):
        assert torch.equal(found(name, toy.scaled(front, factor), x, tokens=1, **short), plain)
    channels = torch.logspace(-3, 3, 64)[torch.randperm(64)]
    assert (found(name, toy.scaled(front, channels), x, tokens=1, **short) - plain).abs().max() < 0.01


@pytest.mark.parametrize("name", IMAGES)
def test_the_key_decides_and_an_image_is_attacked_alone(name: str) -> None:
    x, front = toy.images(4), toy.curved()
    knobs = {"start": "random", "steps": 30} if name == "rmle" else {}
    one, again, other = (found(name, front, x, key=key, noise=0.1, tokens=1, **knobs) for key in (1, 1, 2))
    assert torch.equal(one, again)
    assert torch.equal(one, other) == (name == "closed-form"), "what draws must draw anew"


@pytest.mark.parametrize("name", IMAGES)
def test_the_mean_of_uploads_has_less_noise(name: str) -> None:
    x, front = toy.images(4), toy.embedding()
    one, many = (found(name, front, x, noise=1.0, uploads=count, tokens=1) for count in (1, 16))
    assert toy.psnr(many, x) > toy.psnr(one, x) + 1.5


class Stopped(Exception):
    pass


@pytest.mark.parametrize("restarts", [1, 2])
def test_an_interrupted_attack_ends_where_it_would_have(
    restarts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsplit.attacks.work.EVERY", 10)
    transcript, knowledge = toy.setting(toy.curved(), toy.images(3), 1)
    piece = attack("rmle", steps=40, tv=0.1, patch=0.01, restarts=restarts)
    whole = piece.run(transcript, knowledge, 0, Work())
    calls = 0

    def stop(what: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 40 * restarts - 15:
            raise Stopped

    with pytest.raises(Stopped):
        piece.run(transcript, knowledge, 0, Work(tmp_path / "rmle", stop))
    steps: list[int] = []
    work = Work(tmp_path / "rmle", lambda what, done, total: steps.append(done))
    assert torch.equal(piece.run(transcript, knowledge, 0, work), whole)
    assert steps == list(range(21, 41)), "it goes on, and does not begin again"
    assert work.spent == 40 * restarts


# Of the closed form.


@pytest.mark.parametrize(("model", "tokens"), [("fedsplit_micro", 0), ("class token", 1)])
def test_a_bare_patch_embedding_is_solved_to_the_last_digits(model: str, tokens: int) -> None:
    front = bare(model)
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        transcript = Transcript(front(x)[None], (3, 32, 32), tokens)
    images = attack("closed-form").run(transcript, Knowledge(front=front), 0, Work())
    assert toy.psnr(images, x) > 60


def bare(model: str) -> toy.Front:
    """The front of a cut before the first block, on images in [0, 1]."""
    if model == "fedsplit_micro":
        from fedsplit.config import resolve
        from fedsplit.front.models import create

        vit = create(resolve({"model.name": "fedsplit_micro"}).model, 10, 0).vit
    else:
        from timm.models import VisionTransformer

        vit = VisionTransformer(img_size=32, patch_size=4, embed_dim=64, depth=1, num_heads=2)
    from fedsplit.front.vit import Part

    part = Part(vit, range(0), embeds=True).eval()
    return lambda x: part((x - 0.5) / 0.5)


def test_the_closed_form_behind_a_block_is_a_first_order_attack() -> None:
    x = toy.images(4)
    straight = toy.psnr(found("closed-form", toy.embedding(), x, tokens=1), x)
    bent = toy.psnr(found("closed-form", toy.curved(), x, tokens=1), x)
    grey = toy.psnr(torch.full_like(x, 0.5), x)
    assert straight > 60 and grey + 5 < bent < straight - 10


def test_an_embedding_that_keeps_less_than_a_patch_gives_what_it_keeps() -> None:
    x, front = toy.images(4), toy.embedding(channels=24)
    images = found("closed-form", front, x, tokens=1)
    assert (front(images) - front(x)).abs().max() < 0.2 * (front(x) - front(0 * x + 0.5)).abs().max()
    assert toy.psnr(torch.full_like(x, 0.5), x) < toy.psnr(images, x) < 40


# Of the linear map.


def test_a_linear_map_needs_images() -> None:
    transcript, knowledge = toy.setting(toy.identity, toy.images(2))
    with pytest.raises(NotApplicable, match="1 images"):
        attack("linear").run(transcript, dataclasses.replace(knowledge, auxiliary=toy.images(1)), 0, Work())


def test_the_damping_is_chosen_for_the_noise() -> None:
    x, front = toy.images(8), toy.embedding()
    chosen = toy.psnr(found("linear", front, x, noise=1.0, tokens=1), x)
    least = toy.psnr(found("linear", front, x, noise=1.0, tokens=1, ridge=1e-12), x)
    assert chosen > least


# Of the optimisation.


def test_cosine_and_priors_find_images_too() -> None:
    x, front = toy.images(4), toy.embedding()
    grey = toy.ssim(torch.full_like(x, 0.5), x)
    assert toy.ssim(found("rmle", front, x, tokens=1, distance="cosine"), x) > max(0.9, grey)
    smooth, plain = (found("rmle", front, x, tokens=1, tv=tv) for tv in (3.0, 0.0))
    assert smooth.diff(dim=3).square().mean() < 0.5 * plain.diff(dim=3).square().mean()
    joined = found("rmle", front, x, tokens=1, patch=0.3)
    assert borders(joined) < 0.5 * borders(plain)


def borders(x: Tensor) -> Tensor:
    return x.diff(dim=3)[:, :, :, 3::4].square().mean()


def test_of_restarts_each_image_keeps_the_closest() -> None:
    x = toy.images(4)
    rugged: toy.Front = lambda x: torch.sin(9 * toy.identity(x))  # noqa: E731
    transcript, knowledge = toy.setting(rugged, x)
    away = [
        (
            rugged(attack("rmle", start="random", steps=60, restarts=count).run(transcript, knowledge, 5, Work()))
            - rugged(x)
        )
        .square()
        .mean((1, 2))
        for count in (1, 4)
    ]
    assert (away[1] <= away[0] * 1.0001).all() and (away[1] < away[0]).any()


def test_zeros_are_black_and_grey_is_grey() -> None:
    for start, value in (("zeros", 0.0), ("grey", 0.5)):
        assert (found("rmle", toy.constant, toy.images(2), start=start, steps=1) == value).all()


# Of the labels.


def seen_gradients(tail: nn.Module, z: Tensor, labels: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    nn.functional.cross_entropy(tail(z), labels).backward()
    assert z.grad is not None
    return z.grad


class Tail(nn.Module):
    """Mean of tokens, norm, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 10)

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(z.mean(1)))
        return logits


def test_labels_are_read_from_gradients() -> None:
    tail, body = Tail(), nn.Linear(12, 12)
    labels = torch.tensor([3, 3, 9, 0, 1, 7, 3, 2])
    h = torch.randn(2, 8, 5, 12)
    gradients = torch.stack([seen_gradients(tail, body(one), labels) for one in h])
    knowledge = Knowledge(body=body, tail=tail)
    transcript = Transcript(h, toy.SHAPE, gradients=gradients, batch=8)
    got = attack("labels").run(transcript, knowledge, 0, Work())
    assert got.dtype == torch.int64 and torch.equal(got, labels)
    sure = nn.Sequential(tail, nn.Linear(10, 10))
    with torch.no_grad():
        sure[1].weight.mul_(60)
    seen = torch.stack([seen_gradients(sure, body(one), labels) for one in h])
    for factor in (1.0, 2.0**-20, 37.0):
        same = dataclasses.replace(transcript, gradients=seen * factor)
        assert torch.equal(attack("labels").run(same, Knowledge(body=body, tail=sure), 0, Work()), labels)


def test_constant_gradients_say_nothing_of_labels() -> None:
    tail, labels = Tail(), torch.arange(400) % 10
    transcript = Transcript(torch.randn(1, 400, 5, 12), toy.SHAPE, gradients=torch.ones(1, 400, 5, 12))
    got = attack("labels").run(transcript, Knowledge(body=nn.Identity(), tail=tail), 0, Work())
    assert (got == labels).float().mean() < 0.2


def test_labels_that_were_sent_are_given_back_and_without_gradients_there_are_none() -> None:
    knowledge = Knowledge(body=nn.Identity(), tail=Tail())
    plain = Transcript(torch.randn(1, 3, 5, 12), toy.SHAPE)
    sent = dataclasses.replace(plain, labels=torch.tensor([2, 0, 1]))
    assert torch.equal(attack("labels").run(sent, knowledge, 0, Work()), torch.tensor([2, 0, 1]))
    with pytest.raises(NotApplicable, match="none came up"):
        attack("labels").run(plain, knowledge, 0, Work())


def test_the_rest_is_body_and_tail() -> None:
    body, tail = nn.Linear(12, 12), Tail()
    rest = Knowledge(body=body, tail=tail).rest
    h = torch.randn(2, 5, 12)
    assert rest is not None and torch.equal(rest(h), tail(body(h)))
    assert Knowledge(body=body).rest is None and Knowledge(tail=tail).rest is None


def test_patches_go_apart_and_together() -> None:
    x = torch.rand(2, 3, 8, 12)
    assert torch.equal(to_images(to_patches(x, 4), (3, 8, 12), 4), x)
    assert torch.equal(to_patches(x, 4)[0, 4], x[0, :, 4:, 4:8].flatten())
    assert patch_side(Transcript(torch.zeros(1, 2, 7, 5), (3, 8, 12), 1)) == 4
    for count in (5, 1):
        with pytest.raises(NotApplicable, match="grid of square patches"):
            patch_side(Transcript(torch.zeros(1, 2, count, 5), (3, 8, 12), 1))
