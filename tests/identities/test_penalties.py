"""Penalties on the front's output: their values against hand computations, and that they do what they are for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import job_of, small, tensors_of
from torch import Tensor
from torch.func import functional_call

from fedsplit.attacks.decoders import decoder
from fedsplit.client import client_round
from fedsplit.data.batches import to_batch
from fedsplit.front import PENALTIES, models
from fedsplit.front.adversary import Adversary
from fedsplit.front.linear_adversary import LinearAdversary
from fedsplit.front.lipschitz import Lipschitz
from fedsplit.front.nopeek import NoPeek, distance_correlation
from fedsplit.front.vit import Part
from fedsplit.rng import key, torch_rng
from fedsplit.settings import Model
from fedsplit.types import FedsplitError, Scalar, Tensors
from fedsplit.world import world

NANO: dict[str, Scalar] = {"model__name": "fedsplit_nano", "model__pretrained": False, "cut__front": 1}
ACTIVE: dict[str, Scalar] = {"front__adversary__warmup": 0, "front__adversary__threshold": 0.0}


def by_definition(x: Tensor, z: Tensor) -> float:
    """Distance correlation, entry for entry in double precision."""

    def centred(flat: Tensor) -> Tensor:
        n = len(flat)
        d = torch.tensor([[(flat[i] - flat[j]).norm() for j in range(n)] for i in range(n)], dtype=torch.float64)
        return d - d.mean(0, keepdim=True) - d.mean(1, keepdim=True) + d.mean()

    a, b = centred(x.double().flatten(1)), centred(z.double().flatten(1))
    return float((a * b).mean().sqrt() / ((a * a).mean() * (b * b).mean()) ** 0.25)


def test_distance_correlation() -> None:
    x = torch.randn(12, 3, 8, 8)
    assert distance_correlation(x, x).item() == pytest.approx(1, abs=1e-5)
    turn, _ = torch.linalg.qr(torch.randn(192, 192))
    assert distance_correlation(x, 7 * x.flatten(1) @ turn + 3).item() == pytest.approx(1, abs=1e-4)
    z = torch.tanh(x[:, 0, :2]) + 0.5 * torch.randn(12, 2, 8)
    assert distance_correlation(x, z).item() == pytest.approx(by_definition(x, z), abs=1e-4)
    one, other = torch.randn(600, 1), torch.randn(600, 1)
    assert distance_correlation(one, other).item() < 0.15
    assert distance_correlation(one, one**2).item() > 0.4, "a dependence without a correlation"


def test_distance_correlation_of_constant_and_equal_samples_has_a_gradient() -> None:
    x = torch.randn(6, 5)
    for z in (torch.ones(6, 5), torch.randn(6, 5)[[0, 0, 1, 1, 2, 2]], torch.randn(1, 5)):
        z.requires_grad_()
        value = distance_correlation(x[: len(z)], z)
        value.backward()
        assert z.grad is not None and z.grad.isfinite().all()
        assert len(z.unique(dim=0)) == 3 or value.item() < 1e-3


def test_nopeek_is_its_weight_times_the_correlation() -> None:
    x, h = torch.randn(6, 3, 8, 8), torch.randn(6, 4, 5, requires_grad=True)
    front: Any = None
    term, memory = NoPeek(weight=0.5).penalty(front, x, h, None, 0)
    assert memory is None and term.item() == pytest.approx(0.5 * distance_correlation(x, h).item())
    assert NoPeek(weight=0.0).penalty(front, x, h, None, 0)[0].item() == 0
    assert NoPeek().penalty(front, x, h.detach(), None, 0)[0].item() == 0, "a frozen front has nothing to learn"


class Linear:
    """A front of linear maps, whose outputs may be scaled and moved."""

    def __init__(self, scales: tuple[float, float] = (1.0, 1.0), offset: float = 0.0) -> None:
        self.first, self.second = torch.randn(12, 20, generator=torch_rng(1)), torch.randn(5, 7, generator=torch_rng(2))
        self.scales, self.offset = scales, offset

    def stages(self, x: Tensor, noise: int) -> Iterator[Tensor]:
        z = (x.flatten(1) @ self.first).view(-1, 4, 5)
        yield self.scales[0] * z + self.offset
        yield self.scales[1] * (z @ self.second) + self.offset


@pytest.mark.parametrize("over", ["max", "mean"])
@pytest.mark.parametrize("draws", [1, 3])
def test_the_lipschitz_term_of_linear_maps(over: str, draws: int) -> None:
    x, h, front = torch.randn(6, 3, 2, 2), torch.zeros(1, requires_grad=True), Linear()
    piece = Lipschitz(alpha=0.1, sigma=0.3, draws=draws, over=over)
    term, _ = piece.penalty(front, x, h, None, 9)  # type: ignore[arg-type]
    first = x.flatten(1) @ front.first
    second = (first.view(-1, 4, 5) @ front.second).flatten(1)
    spreads = [((z - z.mean(0)) ** 2).mean().sqrt() for z in (first, second)]
    ks: list[list[Tensor]] = [[], []]
    for draw in range(draws):
        delta = 0.3 * torch.randn(x.shape, generator=torch_rng(key(9, "delta", draw))).flatten(1)
        moved = delta @ front.first
        far = (moved.view(-1, 4, 5) @ front.second).flatten(1)
        ks[0] += list(moved.norm(dim=1) / spreads[0] / delta.norm(dim=1))
        ks[1] += list((far.norm(dim=1) / spreads[1]) / (moved.norm(dim=1) / spreads[0]))
    pick = max if over == "max" else lambda values: sum(values) / len(values)
    assert len(ks[0]) == 6 * draws
    assert term.item() == pytest.approx(0.1 * float(sum(pick(values) for values in ks)), rel=1e-4)


def test_the_lipschitz_term_does_not_fall_by_rescaling_or_moving_features() -> None:
    x, h = torch.randn(6, 3, 2, 2), torch.zeros(1, requires_grad=True)
    fronts = [Linear(), Linear((0.01, 1.0)), Linear((1.0, 0.01)), Linear(offset=30.0)]
    terms = [Lipschitz().penalty(front, x, h, None, 9)[0].item() for front in fronts]  # type: ignore[arg-type]
    assert terms == pytest.approx([terms[0]] * 4, rel=1e-3)
    scale = torch.ones((), requires_grad=True)
    front = Linear((scale, 1.0))  # type: ignore[arg-type]
    Lipschitz(alpha=1.0).penalty(front, x, h, None, 9)[0].backward()  # type: ignore[arg-type]
    assert scale.grad is not None and abs(scale.grad.item()) < 1e-4, "nor does its gradient point there"


def nano(dropout: float = 0.0) -> Part:
    settings = Model(name="fedsplit_nano", pretrained=False, dropout=dropout)
    return Part(models.create(settings, 10, 0).vit, range(2), embeds=True)


def test_the_stages_of_a_front_are_its_embedding_and_its_blocks() -> None:
    front, x = nano(0.3), torch.randn(2, 3, 32, 32)
    stages = list(front.stages(x, 5))
    assert len(stages) == 3 and torch.equal(stages[-1], front.begin(x, 5))
    assert torch.equal(stages[0], front.embed(x, 5))


def test_both_lipschitz_passes_share_their_dropout() -> None:
    """Else the term would be that of two networks, and grow without a bound as the noise gets small."""
    front, x = nano(0.3), torch.randn(4, 3, 32, 32)
    h = front(x)
    large, small_ = (
        Lipschitz(alpha=1.0, sigma=sigma).penalty(front, x, h, None, 3)[0].item() for sigma in (0.02, 0.002)
    )
    assert small_ == pytest.approx(large, rel=0.1)
    assert Lipschitz().penalty(front, x[:1], h[:1], None, 3)[0].item() == 0, "one sample has no spread"
    assert Lipschitz().penalty(front, x, h.detach(), None, 3)[0].item() == 0
    one, again, other = (Lipschitz().penalty(front, x, h, None, stream)[0] for stream in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


SHAPE = (3, 16, 16)
IMAGES = torch.rand(12, *SHAPE, generator=torch_rng(4))
SMOOTH = F.interpolate(IMAGES[:, :, :4, :4], size=16, mode="bilinear")
BARE: Any = SimpleNamespace(prefix=0, pixels=lambda x: x)


def patches(x: Tensor) -> Tensor:
    """An identity front: the pixels (B, 16, 48) of 4 x 4 patches."""
    return F.unfold(x, 4, stride=4).transpose(1, 2).contiguous().requires_grad_()


def error(memory: Tensors, h: Tensor) -> float:
    net = decoder("conv", (16, 48), 0, SHAPE, 8)
    weights = {name.partition("|")[2]: value for name, value in memory.items() if name.startswith("weight|")}
    with torch.no_grad():
        return float((functional_call(net, weights, (h,)).sigmoid() - SMOOTH).square().mean())


def follow(piece: Adversary, h: Tensor, calls: int) -> tuple[list[float], Tensors]:
    terms: list[float] = []
    memory: Any = None
    for call in range(calls):
        term, memory = piece.penalty(BARE, SMOOTH, h, memory, call)
        terms.append(term.item())
    return terms, memory


def test_the_adversary_learns_an_identity_front_and_not_a_constant_one() -> None:
    piece = Adversary(beta=2.0, form="capped", warmup=0, width=8, steps=4, lr=0.02)
    known, constant = patches(SMOOTH), torch.ones(12, 16, 48, requires_grad=True)
    _, young = follow(piece, known, 1)
    (seen, learnt), (hidden, blind) = follow(piece, known, 20), follow(piece, constant, 20)
    worst = float((SMOOTH - SMOOTH.mean(0)).square().mean())
    assert error(learnt, known) < 0.3 * error(young, known) and error(learnt, known) < 0.5 * worst
    assert hidden[-1] == pytest.approx(-2 * worst, rel=0.05) and min(seen + hidden) >= -2 * worst - 1e-6
    assert seen[-1] > 0.5 * hidden[-1], "the term is lower where the features say nothing"
    term, _ = piece.penalty(BARE, SMOOTH, known, learnt, 0)
    term.backward()
    assert known.grad is not None and known.grad.abs().sum() > 0 and constant.grad is None
    pytest.importorskip("torchmetrics")
    hinge = Adversary(beta=2.0, warmup=0, width=8, threshold=0.2)
    terms = [hinge.penalty(BARE, SMOOTH, *pair, 0)[0] for pair in ((known, learnt), (constant, blind))]
    assert 0.2 < terms[0].item() <= 1.6 and terms[1].item() == 0 and not terms[1].requires_grad
    known.grad = None
    terms[0].backward()
    assert known.grad is not None and known.grad.abs().sum() > 0


def test_the_adversary_warms_up_and_starts_anew() -> None:
    h = patches(SMOOTH)
    piece = Adversary(form="capped", warmup=2, reset=4, width=8)
    terms, memory = follow(piece, h, 8)
    assert [term != 0 for term in terms] == [False, False, True, True] * 2
    assert all(isinstance(value, Tensor) for value in memory.values()) and int(memory["age"]) == 4
    assert not any(value.requires_grad for value in memory.values())
    with pytest.raises(FedsplitError, match=r"front\.adversary\.reset=2 ends every decoder within its warm-up of 2"):
        Adversary(warmup=2, reset=2)
    with pytest.raises(FedsplitError, match=r"front\.adversary\.width=12 is no multiple of 8"):
        Adversary(width=12)


def test_a_call_of_the_adversary_is_pure() -> None:
    h = patches(SMOOTH)
    piece = Adversary(form="capped", warmup=0, width=8, steps=2)
    _, memory = follow(piece, h, 3)
    before = {name: value.clone() for name, value in memory.items()}
    _, one = piece.penalty(BARE, SMOOTH, h, memory, 3)
    _, again = piece.penalty(BARE, SMOOTH, h, memory, 4)
    assert all(torch.equal(memory[name], before[name]) for name in before)
    assert all(torch.equal(one[name], again[name]) for name in one) and int(one["age"]) == 4
    assert piece.penalty(BARE, SMOOTH, h.detach(), None, 0) == (torch.zeros(()), None)


def test_splitting_the_adversarys_training_over_calls_changes_nothing() -> None:
    """Adam goes on with its moments: two calls of one step are one of two."""
    h = patches(SMOOTH)
    (_, one), (_, two) = follow(Adversary(width=8, steps=1), h, 2), follow(Adversary(width=8, steps=2), h, 1)
    assert all(torch.equal(one[name], two[name]) for name in one if name != "age")


def test_the_linear_adversary_is_ridge_regression_on_unseen_images() -> None:
    h = torch.randn(12, 16, 7, generator=torch_rng(8))
    inputs = torch.cat([h, h.mean(1, keepdim=True).expand(12, 16, 7)], 2).double()
    inputs = inputs - inputs.mean(0)
    inputs = inputs / inputs.square().mean((0, 1)).sqrt()
    pixels = patches(IMAGES).detach().double()
    pixels = pixels - pixels.mean(0)
    x, y = inputs[:6].reshape(-1, 14), pixels[:6].reshape(-1, 48)
    # Ridge regression as least squares with rows for the damping.
    rows = torch.cat([x, (0.01 * len(x)) ** 0.5 * torch.eye(14, dtype=x.dtype)])
    found = torch.linalg.lstsq(rows, torch.cat([y, torch.zeros(14, 48, dtype=y.dtype)])).solution
    explained = 1 - float((pixels[6:] - inputs[6:] @ found).square().sum() / pixels[6:].square().sum())
    piece = LinearAdversary(weight=2.0, threshold=0.0, ridge=0.01)
    assert piece.explained(inputs, pixels).item() == pytest.approx(explained, abs=1e-9)
    term, _ = piece.penalty(BARE, IMAGES, h.requires_grad_(), None, 0)
    assert term.item() == pytest.approx(2 * max(0, explained), abs=1e-6)


def test_the_linear_adversary_tells_an_identity_front_from_a_constant_one_at_any_scale() -> None:
    """Random channels, linearly mixed and scaled, are as open as the pixels; what says nothing costs nothing."""
    mixed = (patches(SMOOTH).detach() @ torch.randn(48, 60, generator=torch_rng(3))).requires_grad_()
    piece = LinearAdversary(weight=1.0, threshold=0.0, ridge=1e-6)
    open_, _ = piece.penalty(BARE, SMOOTH, mixed, None, 0)
    scaled, _ = piece.penalty(BARE, SMOOTH, 1000 * mixed + 5, None, 0)
    assert open_.item() > 0.99 and scaled.item() == pytest.approx(open_.item(), abs=1e-4)
    open_.backward()
    assert mixed.grad is not None and mixed.grad.abs().sum() > 0
    noise = torch.randn(12, 16, 5, generator=torch_rng(5), requires_grad=True)
    for h in (noise, torch.ones(12, 16, 48, requires_grad=True)):
        assert LinearAdversary(threshold=0.3).penalty(BARE, SMOOTH, h, None, 0)[0].item() == 0
    with pytest.raises(FedsplitError, match=r"needs a grid of square patches, but 15 patch tokens"):
        piece.penalty(BARE, SMOOTH, mixed[:, 1:], None, 0)


def test_the_hinge_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(FedsplitError, match=r"form=hinge needs torchmetrics: pip install 'fedsplit\[audit\]'"):
        follow(Adversary(warmup=0, width=8), patches(SMOOTH), 1)


def test_a_front_gives_pixels_back() -> None:
    built = world(small(**NANO))
    images = built.data.train
    batch = to_batch(images, torch.arange(4).numpy(), kind="none", stream=0, **built.look)
    wanted = torch.from_numpy(images.pixels[:4].copy()).permute(0, 3, 1, 2) / 255
    assert torch.allclose(built.parts.front.pixels(batch.x), wanted, atol=1e-6)


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_moves_what_the_front_trains_and_nothing_of_a_frozen_one(name: str) -> None:
    if name == "adversary":
        pytest.importorskip("torchmetrics")

    def trained(**changes: Scalar) -> Tensors:
        built = world(small(**NANO, **ACTIVE, local__max_steps=2, **changes))
        return tensors_of(client_round(built, job_of(built)))

    plain, other = trained(), trained(front__penalties=name)
    assert any(
        not torch.equal(plain[key], other[key]) for key in plain if key.startswith(("blocks.0.", "patch_embed."))
    )
    assert all(value.isfinite().all() for value in other.values())
    plain, other = trained(train="tail"), trained(front__penalties=name, train="tail")
    assert all(torch.equal(plain[key], other[key]) for key in plain)


def test_the_accounts_leave_the_adversary_out() -> None:
    pytest.importorskip("torchmetrics")
    built = [
        world(small(**NANO, **ACTIVE, local__max_steps=2, **more)) for more in ({}, {"front__penalties": "adversary"})
    ]
    plain, other = (client_round(each, job_of(each)).report for each in built)
    assert plain.client_flops == other.client_flops and plain.client_peak_bytes == other.client_peak_bytes
