"""The learned attacks find what a front lets through, and nothing where it lets nothing through."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_learned import (
    AUXILIARY,
    MEAN,
    SHAPE,
    VICTIMS,
    Clients,
    asks,
    classify,
    constant,
    curved,
    identity,
    knows,
    mse,
    noisy,
    saw,
    shuffled,
    ssim,
)

from fedsplit.attacks import ATTACKS, work
from fedsplit.attacks.base import Knowledge, NotApplicable, Transcript, check
from fedsplit.attacks.decoders import KINDS, decoder
from fedsplit.attacks.learned import Scale, answers, is_shuffled
from fedsplit.attacks.work import Work
from fedsplit.types import FedsplitError

SMALL: dict[str, dict[str, Any]] = {
    "inverse-net": {"epochs": 4, "width": 32},
    "averaged": {"epochs": 4, "width": 32},
    "shadow": {"epochs": 4, "steps": 9, "width": 32},
    "fsha": {"steps": 4, "width": 32},
}


def run(
    name: str, transcript: Transcript, knowledge: Knowledge, key: int = 0, at: Work | None = None, **set: Any
) -> Tensor:
    attack = ATTACKS[name](**{**SMALL[name], **set})
    check(attack, name, knowledge)
    found: Tensor = attack.run(transcript, knowledge, key, at or Work())
    assert found.shape == (len(VICTIMS), *SHAPE) and found.dtype == torch.float32
    assert found.min() >= 0 and found.max() <= 1
    return found


def everything() -> Knowledge:
    labels = classify(identity(AUXILIARY, 0)).argmax(1)
    return knows(rest=classify, query=noisy, auxiliary=AUXILIARY, labels=labels, hijack=Clients())


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less to learn from, where only what happens counts."""
    monkeypatch.setattr(sys.modules[__name__], "AUXILIARY", AUXILIARY[:40])


@pytest.mark.parametrize("kind", ["conv", "transformer"])
@pytest.mark.parametrize("name", ["inverse-net", "averaged"])
def test_an_identity_front_hides_nothing(name: str, kind: str) -> None:
    assert ssim(run(name, saw(identity, 2), asks(identity), decoder=kind)) > 0.99
    assert ssim(MEAN) < 0.5


@pytest.mark.parametrize("name", ["inverse-net", "averaged", "shadow"])
def test_a_constant_front_hides_all(name: str) -> None:
    knowledge = knows(rest=classify, query=constant, auxiliary=AUXILIARY, labels=torch.arange(len(AUXILIARY)) % 8)
    for kind in KINDS if name == "inverse-net" else ("conv",):
        found = run(name, saw(constant, 2), knowledge, decoder=kind)
        assert mse(found) > 0.97 * mse(MEAN)
        assert torch.allclose(found, found[:1].expand_as(found), atol=1e-5)


@pytest.mark.parametrize("kind", ["conv", "transformer"])
def test_the_network_learns_what_is_not_linear(kind: str) -> None:
    linear = run("inverse-net", saw(curved), asks(curved), decoder=kind, epochs=1, lr=1e-9)
    assert mse(run("inverse-net", saw(curved), asks(curved), decoder=kind, epochs=8, lr=0.002)) < 0.8 * mse(linear)


def test_averaging_over_uploads_defeats_noise() -> None:
    seen = saw(noisy, 16)
    assert mse(run("averaged", seen, asks(noisy))) < 0.5 * mse(run("inverse-net", seen, asks(noisy)))


@pytest.mark.parametrize(("front", "times"), [(noisy, 3 * 2), (identity, 1)])
def test_a_random_front_is_asked_anew_and_another_once(front: Any, times: int) -> None:
    keys: list[int] = []

    def counted(images: Tensor, key: int) -> Tensor:
        keys.append(key)
        return front(images, key)  # type: ignore[no-any-return]

    run("averaged", saw(front, 2), asks(counted), draws=3)
    assert len(set(keys)) == len(keys) == 2 + times, "two to see whether it is random; one chunk of images"


def test_the_scale_of_a_front_defends_nothing() -> None:
    factor = torch.logspace(-3, 3, 48)
    plain = run("inverse-net", saw(identity), asks(identity))

    def rescaled(by: Tensor | float) -> Tensor:
        front = lambda images, key: identity(images, key) * by  # noqa: E731
        return run("inverse-net", saw(front), asks(front))

    assert torch.equal(rescaled(2.0**-20), plain)
    assert torch.allclose(rescaled(factor), plain, atol=0.01)
    bent = saw(identity)
    assert not torch.allclose(
        run("inverse-net", Transcript(1.5 * bent.activations, SHAPE), asks(identity)), plain, atol=0.1
    )


def test_a_channel_that_stays_the_same_counts_as_nothing() -> None:
    x = torch.randn(20, 4, 3)
    x[:, 1, 2] = 1e4 + 1e-3 * torch.randn(20)
    for scale in (Scale.of(x), Scale.of(1e-12 * x)):
        assert (scale(scale.mean + 0 * x)[:, 1, 2] == 0).all()
        assert scale.std[1, 2] == torch.inf and scale.std.isinf().sum() == 1
    level = Scale.level(x)
    assert torch.allclose(level.undo(level.apply(x)), x, rtol=1e-4)
    assert torch.isfinite(Scale.level(torch.ones(3, 4, 2)).undo(torch.randn(3, 4, 2))).all()


def test_slots_do_not_care_for_the_order_of_tokens() -> None:
    torch.manual_seed(0)
    net = decoder("slots", (18, 48), 2, SHAPE, 32)
    torch.nn.init.normal_(net.leave.weight)
    x = torch.randn(3, 18, 48)
    turned = torch.cat([x[:, :2], x[:, 2:].flip(1)], 1)
    assert torch.allclose(net(x), net(turned), atol=1e-4)
    assert not torch.allclose(net(x), net(x.flip(1)), atol=1e-2), "tokens before the patches are told apart"


@pytest.mark.usefixtures("few")
def test_the_attacker_notices_that_tokens_are_shuffled() -> None:
    fronts = {identity: False, noisy: False, constant: False, curved: False, shuffled: True}
    for front, expected in fronts.items():
        assert is_shuffled(*answers(front, AUXILIARY, 1)) == expected
    assert torch.equal(
        run("inverse-net", saw(shuffled), asks(shuffled)),
        run("inverse-net", saw(shuffled), asks(shuffled), decoder="slots"),
    )


@pytest.mark.slow
def test_slots_find_the_places_of_shuffled_tokens() -> None:
    how = {"epochs": 40, "draws": 40, "lr": 0.002}
    found = {kind: run("inverse-net", saw(shuffled), asks(shuffled), decoder=kind, **how) for kind in ("conv", "slots")}
    assert mse(found["slots"]) < 0.5 * mse(found["conv"])


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", SMALL)
def test_the_key_decides(name: str) -> None:
    one, again, other = (run(name, saw(identity), everything(), key) for key in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("stop", [7, 12])
@pytest.mark.parametrize("name", ["inverse-net", "averaged", "shadow"])
def test_interrupted_work_ends_the_same(name: str, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "EVERY", 3)
    seen, knowledge = saw(noisy, 2), everything()
    whole = run(name, seen, knowledge, batch=8)
    taken: list[int] = []

    def power_cut(what: str, done: int, total: int) -> None:
        taken.append(done)
        if len(taken) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(name, seen, knowledge, at=Work(tmp_path / "work", power_cut), batch=8)
    after: list[int] = []
    at = Work(tmp_path / "work", lambda what, done, total: after.append(done))
    assert torch.equal(run(name, seen, knowledge, at=at, batch=8), whole)
    assert len(taken) + len(after) < at.spent + 4, "it went on, and did not start over"
    at.clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SMALL)
def test_an_attack_says_what_it_needs(name: str) -> None:
    with pytest.raises(NotApplicable, match=f"{name} needs .*auxiliary"):
        check(ATTACKS[name](), name, knows())
    with pytest.raises(FedsplitError, match="no square grid"):
        run(name, Transcript(torch.randn(1, 24, 16, 48), SHAPE, tokens=1), everything())


def test_fsha_says_that_a_frozen_front_is_beyond_it() -> None:
    with pytest.raises(NotApplicable, match="frozen"):
        run("fsha", saw(identity), knows(hijack=Clients(trains=False), auxiliary=AUXILIARY), steps=400)


def test_a_shadow_front_stands_for_the_one_that_is_not_known() -> None:
    labels = classify(identity(AUXILIARY, 0)).argmax(1)
    found = run("shadow", saw(identity), knows(rest=classify, auxiliary=AUXILIARY, labels=labels), epochs=6, steps=150)
    assert mse(found) < 0.6 * mse(MEAN)


@pytest.mark.slow
def test_fsha_leads_clients_into_its_own_feature_space() -> None:
    found = run("fsha", saw(identity), knows(hijack=Clients(), auxiliary=AUXILIARY), steps=150)
    assert mse(found) < 0.8 * mse(MEAN)
