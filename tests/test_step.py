"""One step with the pieces that may sit on it: penalties, plans, edits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsplit import front
from fedsplit.body.service import LocalBody
from fedsplit.client import client_round
from fedsplit.config import keys, resolve
from fedsplit.experiment import start
from fedsplit.front.vit import Part, split
from fedsplit.layout import by_side
from fedsplit.metrics.quality import evaluate
from fedsplit.optim import PartOptimizer
from fedsplit.settings import Optimizer
from fedsplit.step import Client, local_step, u_shape_step, vanilla_step
from fedsplit.types import Batch, Cut, Job, Op, Order, Plan, Scalar, Tensors, knob
from fedsplit.wire.frame import pack, unpack
from fedsplit.wire.link import Link
from fedsplit.world import World, values_of, world

TINY: dict[str, Scalar] = {
    "data.limit": 60,
    "data.test-limit": 20,
    "data.partition": "iid",
    "devices.count": 1,
    "local.max-steps": 2,
}


def job_of(built: World) -> Job:
    model = start(built).model
    frames = (pack({name: model[name] for name in side}) for side in (built.client, built.server))
    return Job(0, 1, 0, *frames)


def trained(**changes: Scalar) -> Tensors:
    built = world(resolve({**TINY, **{name.replace("__", "."): value for name, value in changes.items()}}))
    update = client_round(built, job_of(built))
    return {**unpack(update.up), **unpack(update.server)}


@dataclass(frozen=True)
class Small:
    """Pulls activations to zero."""

    weight: float = knob(1.0, "weight of the term", low=0.0)

    def penalty(self, front: Part, x: Tensor, h: Tensor, memory: Any, key: int) -> tuple[Tensor, Any]:
        assert x.shape[1:] == (3, 32, 32) and h.shape[1:] == (64, 96)
        assert memory is None or memory == 1, "memory of the step before"
        return self.weight * h.pow(2).mean(), 1


@dataclass(frozen=True)
class Rescale:
    """Halves the patch embedding."""

    def edit(self, vit: Any, cut: Cut, key: int) -> nn.Module:
        with torch.no_grad():
            vit.patch_embed.proj.weight.mul_(0.5)
        return vit


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(front.PENALTIES, "small", Small)
    monkeypatch.setitem(front.EDITS, "rescale", Rescale)
    keys.cache_clear()
    yield
    keys.cache_clear()


@pytest.mark.parametrize("shape", ["u-shape", "vanilla", "none"])
def test_a_penalty_joins_the_loss_of_the_front(shape: str, pieces: Any) -> None:
    absent = trained(cut__shape=shape)
    neutral = trained(cut__shape=shape, front__penalties="small", front__small__weight=0.0)
    assert all(torch.equal(absent[name], neutral[name]) for name in absent)
    pulled = trained(cut__shape=shape, front__penalties="small", front__small__weight=5.0)
    assert not torch.equal(absent["patch_embed.proj.weight"], pulled["patch_embed.proj.weight"])


def test_a_penalty_gives_the_same_weights_wherever_the_loss_is(pieces: Any) -> None:
    one = trained(cut__shape="u-shape", front__penalties="small", train="front")
    two = trained(cut__shape="vanilla", front__penalties="small", train="front")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_edit_changes_the_model_before_the_cut(pieces: Any) -> None:
    plain = world(resolve(TINY)).initial["patch_embed.proj.weight"]
    edited = world(resolve({**TINY, "front.edits": "rescale"})).initial["patch_embed.proj.weight"]
    assert torch.equal(edited, plain * 0.5)


def sides(plan_of: int | None = None) -> tuple[Client, LocalBody, Batch, World]:
    built = world(resolve(TINY))
    built.load(built.initial)
    settings = Optimizer(name="sgd", momentum=0.0)
    link = Link({})
    client = Client(built.parts.front, built.parts.tail, link, PartOptimizer(built.client, settings, 0.1), True, True)
    body = LocalBody(built.parts.body, None, Link({}), PartOptimizer(built.server, settings, 0.1), True, True)
    batch = Batch(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]), torch.arange(4))
    return client, body, batch, built


def test_skipped_blocks_neither_run_nor_move() -> None:
    client, body, batch, built = sides()
    before = values_of(built.server)
    plan = Plan(tuple((Op.SKIP if number % 2 else Op.FULL,) for number in range(8)))
    u_shape_step(client, body, batch, 0, Order(plan))
    for name, parameter in built.server.items():
        number = int(name.split(".")[1])
        moved = not torch.equal(before[name], parameter)
        assert moved == (number % 2 == 0), name


def test_a_step_returns_the_loss_before_it() -> None:
    client, body, batch, built = sides()
    wanted = F.cross_entropy(built.parts(batch.x), batch.y).item()
    assert u_shape_step(client, body, batch, 0) == pytest.approx(wanted, abs=1e-6)
    client, _, _, built = sides()
    body = LocalBody(
        built.parts.body, built.parts.tail, Link({}), PartOptimizer(built.server, Optimizer(), 0.1), True, True
    )
    assert vanilla_step(client, body, batch, 0) == pytest.approx(wanted, abs=1e-6)


def test_a_local_step_uses_no_wire() -> None:
    built = world(resolve({**TINY, "cut.shape": "none"}))
    built.load(built.initial)
    link = Link({})
    optimizer = PartOptimizer(built.client, Optimizer(), 0.01)
    client = Client(built.parts.front, built.parts.tail, link, optimizer, True, False)
    batch = Batch(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]), torch.arange(4))
    first = local_step(client, batch, 0)
    assert local_step(client, batch, 0) < first
    assert sum(link.sizes.values()) == link.messages == 0


@pytest.mark.parametrize("shape, tail_at", [("u-shape", 0), ("vanilla", 1), ("none", 0)])
def test_sides_hold_disjoint_parameters(shape: str, tail_at: int) -> None:
    built = world(resolve({**TINY, "cut.shape": shape}))
    parts = split(built.backbone.vit, built.cut)
    client, server = by_side(built.config, parts)
    assert not set(client) & set(server) and set(client) | set(server) == set(built.trains.names)
    assert "head.weight" in (client, server)[tail_at] and "pos_embed" in client


def test_evaluation_counts_by_class() -> None:
    built = world(resolve(TINY))
    built.load(built.initial)
    data = built.data.test
    indices = np.arange(len(data))
    found = evaluate(built.parts, data, indices, 10, batch_size=7, **built.look)
    built.parts.train(False)
    with torch.no_grad():
        x = (torch.from_numpy(data.pixels[indices].copy()).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        logits, labels = built.parts(x), torch.from_numpy(data.labels.copy())
    built.parts.train()
    right = logits.argmax(1) == labels
    assert found.accuracy == pytest.approx(right.float().mean().item())
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert (found.class_samples == np.bincount(data.labels, minlength=10)).all()
    assert (found.class_correct == np.bincount(labels[right].numpy(), minlength=10)).all()
    assert built.parts.front.training, "training goes on in training mode"
