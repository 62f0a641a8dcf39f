"""Invariants 3 and 5: what sharing must equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small import job_of, small, tensors_of, unsplit

from fedsplit import experiment
from fedsplit.client import client_round
from fedsplit.config import Config
from fedsplit.data.batches import to_batch
from fedsplit.front.models import read_weights
from fedsplit.round import State, run_round
from fedsplit.runtime.inprocess import Loop
from fedsplit.share import MERGES
from fedsplit.share.fedavg import FedAvg, Uniform
from fedsplit.world import world


def weights(config: Config, folder: Path) -> dict[str, torch.Tensor]:
    path = experiment.run(config.replace(out=str(folder)), Loop(config))
    return read_weights(path / "model.safetensors")


@pytest.mark.parametrize("shape", ["u-shape", "vanilla", "none"])
def test_one_client_and_one_step_equal_centralised_training(shape: str, tmp_path: Path) -> None:
    config = small(cut__shape=shape, local__max_steps=1)
    central = unsplit(config, lambda p: torch.optim.SGD(p, lr=config.optimizer.lr, momentum=0.9))
    model = weights(config, tmp_path / "run")
    for name, value in central.vit.state_dict().items():
        assert torch.equal(model[name], value), name


def test_clients_that_take_one_full_step_average_to_the_gradient_of_all_their_samples(tmp_path: Path) -> None:
    config = small(devices__count=3, cut__shape="none", local__batch_size=64, local__max_steps=1)
    built = world(config)
    fresh = experiment.start(built).model
    new = run_round(built, State(0, fresh), 0, Loop(config), lambda _: None).state.model
    indices = torch.cat([torch.from_numpy(shard) for shard in built.shards]).numpy()
    built.load(fresh)
    batch = to_batch(built.data.train, indices, kind="none", stream=0, **built.look)
    loss = F.cross_entropy(built.parts(batch.x), batch.y)
    names = list(built.client)
    for name, gradient in zip(names, torch.autograd.grad(loss, list(built.client.values())), strict=True):
        assert torch.allclose(new[name], fresh[name] - config.optimizer.lr * gradient, atol=2e-6), name


@pytest.mark.parametrize("schedule", ["splitfed-v1", "splitfed-v2", "sequential"])
def test_schedules_equal_each_other_with_one_client(schedule: str) -> None:
    config = small(server__schedule=schedule, local__max_steps=2)
    built = world(config)
    alone = tensors_of(client_round(built, job_of(built)))
    outcome = run_round(built, experiment.start(built), 0, Loop(config), lambda _: None)
    for name, value in outcome.state.model.items():
        assert torch.equal(value, alone[name]), name


def test_sequential_is_one_client_after_another() -> None:
    config = small(devices__count=2, server__schedule="sequential", local__max_steps=2)
    built = world(config)
    fresh = experiment.start(built)
    outcome = run_round(built, fresh, 0, Loop(config), lambda _: None)
    chain = {name: value.clone() for name, value in fresh.model.items()}
    parallel = run_round(world(config.replace(server__schedule="splitfed-v1")), fresh, 0, Loop(config), lambda _: None)
    assert outcome.enough and len(outcome.updates) == 2
    assert any(not torch.equal(outcome.state.model[name], parallel.state.model[name]) for name in chain)
    assert outcome.state.optimizer, "a shared server optimiser is kept between rounds"
    assert not parallel.state.optimizer


def test_equal_updates_merge_to_themselves() -> None:
    x = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    for merge in MERGES.values():
        merged = merge().merge({name: torch.zeros_like(v) for name, v in x.items()}, [x, x, x], [1.0, 7.0, 30.0])
        assert all(torch.equal(merged[name], x[name]) for name in x)


def test_fedavg_weighs_by_samples_and_uniform_does_not() -> None:
    base = {"a": torch.zeros(1)}
    updates = [{"a": torch.tensor([0.0])}, {"a": torch.tensor([4.0])}]
    assert FedAvg().merge(base, updates, [1.0, 3.0])["a"].item() == 3.0
    assert Uniform().merge(base, updates, [1.0, 3.0])["a"].item() == 2.0


def test_what_nobody_shares_keeps_its_value_and_what_some_share_is_theirs() -> None:
    base = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}
    merged = FedAvg().merge(base, [{"a": torch.tensor([5.0])}, {}], [1.0, 1.0])
    assert merged["a"].item() == 5.0 and merged["b"].item() == 2.0


def test_a_second_run_in_the_same_process_starts_where_the_first_did(tmp_path: Path) -> None:
    config = small(local__max_steps=1)
    one, two = weights(config, tmp_path / "one"), weights(config, tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_share_nothing_is_local_training() -> None:
    config = small(devices__count=2, local__max_steps=1)
    built = world(config)
    fresh = {name: value.clone() for name, value in experiment.start(built).model.items()}
    own = tensors_of(client_round(built, job_of(built, client=1)))
    assert any(not torch.equal(own[name], fresh[name]) for name in own)
    assert all(torch.equal(FedAvg().merge(fresh, [{}, {}], [1.0, 1.0])[name], fresh[name]) for name in fresh)
