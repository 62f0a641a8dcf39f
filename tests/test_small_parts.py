"""Random streams, optimisers, schedules and the parts of a round."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedsplit.client import client_share
from fedsplit.config import Config, resolve
from fedsplit.layout import pick_device
from fedsplit.local import Choice
from fedsplit.optim import PartOptimizer
from fedsplit.rng import key, numpy_rng, torch_rng
from fedsplit.round import sample
from fedsplit.samples import Stock
from fedsplit.settings import Optimizer
from fedsplit.types import Cut, FedsplitError, Job, split_names
from fedsplit.world import world

BASE = {"data.limit": 60, "data.test-limit": 10, "data.partition": "iid", "devices.count": 5}


def test_a_stream_depends_on_its_name_alone() -> None:
    assert key(0, "batch", 1, 2) == key(0, "batch", 1, 2) < 2**63
    names = [(0, "batch", 1, 2), (1, "batch", 1, 2), (0, "batch", 2, 1), (0, "batch", 12), (0, "augment", 1, 2)]
    assert len({key(*name) for name in names}) == len(names)
    assert torch.equal(torch.randn(3, generator=torch_rng(5)), torch.randn(3, generator=torch_rng(5)))
    assert (numpy_rng(5).random(3) == numpy_rng(5).random(3)).all()


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_an_optimiser_goes_on_from_its_state(name: str) -> None:
    def steps(count: int, optimizer: PartOptimizer, parameter: nn.Parameter) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            (parameter**2).sum().backward()
            optimizer.step()

    settings = Optimizer(name=name, lr=0.1, momentum=0.9, weight_decay=0.01)
    whole = nn.Parameter(torch.tensor([1.0, -2.0]))
    steps(4, PartOptimizer({"w": whole}, settings, 0.1), whole)
    half = nn.Parameter(torch.tensor([1.0, -2.0]))
    first = PartOptimizer({"w": half}, settings, 0.1)
    steps(2, first, half)
    second = PartOptimizer({"w": half}, settings, 0.1)
    second.load({name: value.clone() for name, value in first.state().items()})
    steps(2, second, half)
    assert torch.equal(whole, half)
    assert second.state_bytes() > 0


def test_no_parameters_no_optimiser() -> None:
    nothing = PartOptimizer({}, Optimizer(), 0.1)
    nothing.zero_grad()
    nothing.step()
    nothing.load({})
    assert nothing.state() == {} and nothing.state_bytes() == 0


def test_fedprox_adds_its_gradient() -> None:
    from fedsplit.share.fedprox import FedProx

    w = nn.Parameter(torch.tensor([1.0]))
    optimizer = PartOptimizer({"w": w}, Optimizer(momentum=0.0), 1.0, [FedProx(mu=0.5)])
    with torch.no_grad():
        w += 2.0
    w.grad = torch.zeros(1)
    optimizer.step()
    assert w.item() == 3.0 - 0.5 * 2.0


def test_sampling_is_seeded_without_repetition_and_new_each_round() -> None:
    built = world(resolve({**BASE, "devices.per-round": 3}))
    first = sample(built, 1, 0)
    assert first == sample(built, 1, 0) and len(set(first)) == 3 and set(first) <= set(range(5))
    assert len({tuple(sorted(sample(built, number, 0))) for number in range(1, 20)}) > 3
    assert any(sample(built, 1, 0) != sample(built, 1, attempt) for attempt in range(1, 5))


def test_selectors_combine_by_and() -> None:
    config = resolve({**BASE, "data.select": "random", "data.random.keep": 0.5})
    built = world(config)
    job = Job(2, 1, 0, b"", b"")
    kept, again = (Choice(built, job, Stock(built, job, {}), {}).kept() for _ in range(2))
    assert len(kept) == 6 and set(kept) < set(built.shards[2])
    assert list(kept) == list(again)


def test_the_learning_rate_warms_up_and_follows_its_schedule() -> None:
    built = world(
        resolve({**BASE, "rounds": 5, "optimizer.warmup": 2, "optimizer.schedule": "cosine", "optimizer.lr": 1.0})
    )
    rates = [built.learning_rate(number) for number in range(1, 6)]
    assert rates[0] == 0.5 and rates[2] == pytest.approx(0.5) and rates[4] == pytest.approx(0.0)


@pytest.mark.parametrize("shape", ["u-shape", "vanilla", "none"])
def test_flops_are_shared_between_client_and_server(shape: str) -> None:
    built = world(resolve({**BASE, "cut.shape": shape}))
    client, server = client_share(built)
    assert client + server == built.flops.total
    assert (server == 0) == (shape == "none")
    assert client >= built.flops.front


def test_a_cut_is_an_address() -> None:
    assert list(Cut(2, 1, 8).body) == [2, 3, 4, 5, 6]
    for wrong in ((-1, 0, 8), (0, -1, 8), (5, 4, 8)):
        with pytest.raises(FedsplitError, match="do not fit"):
            Cut(*wrong)


def test_moving_the_cut_changes_bytes_not_results() -> None:
    from fedsplit.experiment import start
    from fedsplit.round import run_round
    from fedsplit.runtime.inprocess import Loop

    def run(config: Config) -> tuple[dict[str, torch.Tensor], int]:
        built = world(config)
        outcome = run_round(built, start(built), 0, Loop(config), lambda _: None)
        return outcome.state.model, sum(outcome.updates[0].report.bytes.values())

    config = resolve({**BASE, "devices.count": 2, "local.max-steps": 2, "model.dropout": 0.1})
    one, two = run(config.replace(cut__front=1)), run(config.replace(cut__front=4, cut__tail=2))
    assert all(torch.equal(one[0][name], two[0][name]) for name in one[0])
    assert one[1] < two[1]


def test_names_and_devices() -> None:
    assert split_names(" a, b ,,c ") == ("a", "b", "c") and split_names("") == ()
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda")
    if not torch.cuda.is_available():
        with pytest.raises(FedsplitError, match="no CUDA"):
            pick_device("cuda")
