"""Plans in whole rounds: what they cost, what they leave alone, what is remembered of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedsplit import experiment
from fedsplit.body.planner import Planner
from fedsplit.body.tally import gradient_cosine
from fedsplit.client import client_round, plan_batches
from fedsplit.config import Config, resolve
from fedsplit.data.batches import to_batch
from fedsplit.front.vit import split
from fedsplit.metrics.flops import counting_copy
from fedsplit.optim import PartOptimizer
from fedsplit.plan import account
from fedsplit.rng import torch_rng
from fedsplit.round import State
from fedsplit.runtime.inprocess import Loop
from fedsplit.settings import Optimizer
from fedsplit.types import FedsplitError, Job, Plan, Scalar, Tensors
from fedsplit.wire.frame import pack, unpack
from fedsplit.world import World, world

TINY: dict[str, Scalar] = {
    "data.limit": 96,
    "data.test-limit": 20,
    "data.partition": "iid",
    "devices.count": 2,
    "rounds": 2,
    "local.batch-size": 8,
    "optimizer.lr": 0.01,
    "eval.every": 9,
}
LORA: dict[str, Scalar] = {"body.edits": "lora", "train": "lora,head"}
BOTH: dict[str, Scalar] = {"body.plans": "knapsack,layerdrop", "body.layerdrop.rate": 0.3}
BANDIT: dict[str, Scalar] = {
    "body.plans": "layerdrop",
    "control.tune": "bandit",
    "control.bandit.rates": "0.2,0.6",
    "control.bandit.groups": 2,
    "data.local-test": 0.2,
    "devices.flops-per-s": 1e9,
    "devices.server-flops-per-s": 1e9,
}


def tiny(changes: dict[str, Scalar] | None = None, **more: Scalar) -> Config:
    return resolve({**TINY, **(changes or {})}).replace(**more)


def job_of(built: World, client: int = 0, number: int = 1, memory: bytes = b"") -> Job:
    first = built.initial
    down, server = ({name: first[name] for name in side} for side in (built.client, built.server))
    return Job(client, number, 0, pack(down), pack(server), memory)


def run(config: Config, out: Path) -> dict[str, Any]:
    path = experiment.run(config.replace(out=str(out)), Loop(config))
    found: dict[str, Any] = json.loads((path / "summary.json").read_text())
    return found


def rows(out: Path, table: str) -> list[dict[str, str]]:
    with (out / f"{table}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_an_optimiser_leaves_idle_entries_and_their_moments_alone(name: str) -> None:
    settings = Optimizer(name=name, momentum=0.9, weight_decay=0.1)

    def made() -> tuple[nn.Parameter, PartOptimizer]:
        w = nn.Parameter(torch.arange(12.0).reshape(4, 3) + 1)
        return w, PartOptimizer({"w": w}, settings, 0.1)

    (w, masked), (free, plain) = made(), made()
    at = torch.tensor([1, 3])
    for step in range(4):
        w.grad, free.grad = (torch.full((4, 3), float(step + 1)) for _ in range(2))
        old, before = w.detach().clone(), {k: v.clone() for k, v in masked.state().items()}
        masked.step({"w": (0, at), "absent": (0, at)})
        plain.step()
        assert torch.equal(w[at], old[at]) and not torch.equal(w[[0, 2]], old[[0, 2]])
        assert torch.equal(w[[0, 2]], free[[0, 2]]), "the others move as without idle ones"
        for slot, moment in masked.state().items():
            if moment.shape == w.shape:
                assert torch.equal(moment[at], before[slot][at] if slot in before else torch.zeros(2, 3)), slot


@pytest.mark.parametrize("extra", [{}, LORA], ids=["full", "lora"])
def test_no_moment_moves_for_what_was_skipped(extra: dict[str, Scalar]) -> None:
    knapsack: dict[str, Scalar] = {"body.plans": "knapsack", "body.knapsack.backward": "random"}
    knapsack |= {"body.knapsack.forward": "random", "body.knapsack.workers": 1, "optimizer.weight-decay": 0.1}
    built = world(tiny({**extra, **knapsack}, local__max_steps=1))
    (order,) = Planner(built, job_of(built), {}).orders([built.shards[0][:8]])
    assert order.plan is not None
    idle = built.parts.body.idle(order.plan)
    state = unpack(client_round(built, job_of(built)).server)
    checked = 0
    for name, (dim, at) in idle.items():
        if name in built.server:
            assert torch.equal(state[name].index_select(dim, at), built.initial[name].index_select(dim, at)), name
            checked += 1
    assert checked
    skipped = [n for n in built.parts.body.numbers if not any(order.plan.ops[n])]
    for name in built.server:
        if any(name.startswith(f"blocks.{n}.") for n in skipped):
            assert torch.equal(state[name], built.initial[name]), name


def steps_flops(built: World, plan: Plan | None) -> int:
    """FLOPs of one sample's split step by torch's counter, part by part as the wire cuts the graph."""
    parts = split(counting_copy(built.backbone.vit), built.cut)
    parts.train()
    x = torch.empty(1, 3, 32, 32, device="meta")
    with FlopCounterMode(display=False) as counter:
        with torch.set_grad_enabled(bool(built.trains.front)):
            h = parts.front(x, None, plan)
        u = h.detach().requires_grad_(bool(built.trains.front))
        v = parts.body(u, None, plan)
        z = v.detach().requires_grad_(bool(built.trains.front or built.trains.body))
        out = parts.tail(z, None, plan)
        for y in (out, v, h):
            if y.requires_grad:
                y.backward(torch.empty_like(y))
    return int(counter.get_total_flops())


@pytest.mark.parametrize("train", ["all", "body,tail", "lora,head"])
@pytest.mark.parametrize("seed", range(2))
def test_what_a_plan_spares_is_what_torch_counts(train: str, seed: int) -> None:
    extra: dict[str, Scalar] = {"body.edits": "lora"} if "lora" in train else {}
    built = world(tiny(extra, train=train, cut__front=2, cut__tail=1))
    ops = torch.randint(0, 3, (8, 6), generator=torch_rng(seed))
    ops[5] = 0
    plan = Plan(tuple(map(tuple, ops.tolist())))
    whole = steps_flops(built, None)
    assert whole == built.flops.total
    assert whole - sum(built.plan_flops.spared(plan)) == steps_flops(built, plan)
    assert built.plan_flops.spared(None) == (0, 0)


@pytest.mark.parametrize("extra", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("budget, workers", [(0.2, 1), (0.6, 0), (0.9, 6)])
def test_a_budget_is_never_exceeded(extra: dict[str, Scalar], budget: float, workers: int) -> None:
    keys: dict[str, Scalar] = {"body.plans": "knapsack", "body.knapsack.budget": budget, "rounds": 1}
    config = tiny({**extra, **keys, "body.knapsack.workers": workers}, cut__tail=0)
    planned, full = account(config), account(config.replace(body__plans=""))
    assert 0 < planned.server_flops <= budget * full.server_flops
    assert planned.client_flops == full.client_flops


def test_the_cut_does_not_change_what_all_blocks_learn() -> None:
    keys: dict[str, Scalar] = {**BOTH, "body.scope": "all", "cut.tail": 0}
    found: list[Tensors] = []
    for front in (1, 4):
        built = world(tiny(keys, cut__front=front))
        memory = b""
        for number in (1, 2):  # the second by the scores of the first
            update = client_round(built, job_of(built, 0, number, memory))
            memory = update.memory
        found.append({**unpack(update.up), **unpack(update.server)})
    names = [name for name in found[0] if "|" not in name]
    assert names and all(torch.equal(found[0][name], found[1][name]) for name in names)


def test_plans_combine_by_minimum_in_any_order() -> None:
    keys: dict[str, Scalar] = {"body.knapsack.backward": "random", "body.knapsack.forward": "random"}

    def table(plans: str) -> torch.Tensor:
        built = world(tiny({**keys, "body.plans": plans}))
        batches = [indices for indices, _ in plan_batches(built, job_of(built), built.shards[0])]
        orders = Planner(built, job_of(built), {}).orders(batches)
        return torch.tensor([order.plan.ops if order.plan else [[2] * 6] * 8 for order in orders])

    knapsack, layerdrop = table("knapsack"), table("layerdrop")
    assert torch.equal(table("knapsack,layerdrop"), torch.minimum(knapsack, layerdrop))
    assert torch.equal(table("layerdrop,knapsack"), torch.minimum(knapsack, layerdrop))
    assert not torch.equal(knapsack, layerdrop)


def test_neutral_plans_do_not_cross_the_wire() -> None:
    keys: dict[str, Scalar] = {"body.knapsack.budget": 1.0, "body.layerdrop.rate": 0.0}
    plain, neutral = (
        client_round(built, job_of(built)).report
        for built in (world(tiny()), world(tiny({"body.plans": "knapsack,layerdrop", **keys})))
    )
    assert plain.bytes == neutral.bytes and plain.server_flops == neutral.server_flops
    planned = client_round(built := world(tiny({"body.plans": "layerdrop"})), job_of(built)).report
    assert planned.bytes["activations-up"] > plain.bytes["activations-up"] and planned.server_flops < plain.server_flops


def test_scores_are_taken_once_and_kept_by_the_client() -> None:
    built = world(tiny({"body.plans": "knapsack", "body.knapsack.calibrate": 1}))
    update = client_round(built, job_of(built))
    memory = unpack(update.memory)
    scores = memory["score|fisher"]
    assert update.report.probe_steps == 1 and scores.shape == (48, 8, 6)
    known = ~scores.isnan().all(-1).all(-1)
    assert int(known.sum()) == 8, "those of the one probed batch"
    body = list(built.cut.body)
    assert (scores[known][:, body] > 0).all() and (scores[known][:, : built.cut.front] >= 0).all()
    again = client_round(built, job_of(built, 0, 2, update.memory))
    assert again.report.probe_steps == 0 and unpack(again.memory).keys() == memory.keys()
    due = world(tiny({"body.plans": "knapsack", "body.knapsack.refresh": 1}))
    assert client_round(due, job_of(due, 0, 2, update.memory)).report.probe_steps > 0


def test_scores_see_what_the_gradients_are() -> None:
    """Fisher scores of a probed step are squared gradients: of a step without a plan at the same weights."""
    built = world(tiny({"body.plans": "knapsack", "body.knapsack.calibrate": 1}, local__max_steps=1))
    job = job_of(built)
    orders = Planner(built, job, {}).orders([built.shards[0][:8]])
    assert orders[0].probe == (), "one step alone: a probe would cost more than the budget"
    built = world(tiny({"body.plans": "knapsack", "body.knapsack.calibrate": 1}))
    memory = unpack(client_round(built, job).memory)
    indices, stream = next(iter(plan_batches(built, job, built.shards[0])))
    built.load(built.initial)
    batch = to_batch(built.data.train, indices, kind="none", stream=stream, **built.look)
    loss = nn.functional.cross_entropy(built.parts(batch.x, built.key("noise", 1, 0, 0)), batch.y)
    for parameter in (*built.client.values(), *built.server.values()):
        parameter.grad = None
    loss.backward()
    place = int((built.shards[0] == indices[0]).nonzero()[0][0])
    number = built.cut.front
    g = {name: p.grad.square() for name, p in built.parts.body.block(number).named_parameters() if p.grad is not None}
    unit = g["mlp.fc1.weight"].reshape(6, -1).sum(1) + g["mlp.fc1.bias"].reshape(6, -1).sum(1)
    unit += g["attn.qkv.weight"].reshape(3, 6, -1).sum((0, 2)) + g["attn.qkv.bias"].reshape(3, 6, -1).sum((0, 2))
    unit += g["attn.proj.weight"].reshape(96, 6, -1).sum((0, 2)) + g["mlp.fc2.weight"].reshape(96, 6, -1).sum((0, 2))
    assert torch.allclose(memory["score|fisher"][place, number], unit, rtol=1e-4)


def test_the_cosine_is_that_of_the_exact_gradient() -> None:
    built = world(tiny(cut__front=1))
    batch = to_batch(built.data.train, built.shards[0][:8], kind="none", stream=0, **built.look)

    def cosine(forward: range) -> float:
        return gradient_cosine(built, batch, 0, Plan(tuple((1,) if n in forward else (2,) for n in range(8))))

    assert cosine(range(0)) == pytest.approx(1.0, abs=1e-6)
    assert cosine(range(1, 4)) < cosine(range(5, 8)) < 1, "early FORWARD biases the client's gradient more"


def test_a_diagnostic_changes_nothing() -> None:
    on, off = (
        client_round(built, job_of(built)) for built in (world(tiny(BOTH, body__cosine=on)) for on in (True, False))
    )
    assert on.up == off.up and on.report.bytes == off.report.bytes and off.report.gradient_cosine is None
    assert -1 <= (on.report.gradient_cosine or 9) <= 1


CASES = {
    "knapsack+layerdrop": BOTH,
    "lora, all blocks": {**LORA, **BOTH, "body.scope": "all", "cut.shape": "none"},
    "vanilla": {**BOTH, "cut.shape": "vanilla"},
}


@pytest.mark.parametrize("keys", CASES.values(), ids=CASES)
def test_a_resumed_run_ends_in_the_same_weights(keys: dict[str, Scalar], tmp_path: Path) -> None:
    config = tiny(keys, rounds=2)
    whole = run(config, tmp_path / "whole")
    run(config.replace(rounds=1), tmp_path / "parts")
    path = experiment.run(tiny({"resume": str(tmp_path / "parts")}, rounds=2), Loop(config))
    resumed = json.loads((path / "summary.json").read_text())
    for name in ("weights_sha256", "ledger_sha256", "server_flops", "client_flops", "accuracy"):
        assert whole[name] == resumed[name], name


def test_a_bandit_is_resumed_to_the_bit(tmp_path: Path) -> None:
    config = tiny(BANDIT, rounds=4, body__layerdrop__recover=0.0)
    whole = run(config, tmp_path / "whole")
    run(config.replace(rounds=2), tmp_path / "parts")
    path = experiment.run(tiny({"resume": str(tmp_path / "parts")}, rounds=4), Loop(config))
    assert json.loads((path / "summary.json").read_text())["weights_sha256"] == whole["weights_sha256"]
    chosen = rows(tmp_path / "whole", "choices")
    assert chosen == rows(tmp_path / "parts", "choices") and len(chosen) == 4 * 2
    assert {row["group"] for row in chosen} == {"0", "1"} and {row["rate"] for row in chosen} <= {"0.2", "0.6"}
    assert all(float(row["seconds"]) > 0 and row["reward"] for row in chosen)
    assert (tmp_path / "whole" / "choices.png").stat().st_size > 1000


def test_tables_say_which_units_ran(tmp_path: Path) -> None:
    config = tiny({"body.plans": "layerdrop", "body.layerdrop.recover": 0.5, "body.cosine": True})
    run(config, tmp_path / "run")
    units = rows(tmp_path / "run", "units")
    assert len(units) == 2 * 8 * 6
    by_round = {number: [row for row in units if row["round"] == number] for number in "12"}
    assert sum(int(row["skip"]) for row in by_round["1"]) > 0 == sum(int(row["skip"]) for row in by_round["2"])
    assert {int(r["full"]) + int(r["forward"]) + int(r["skip"]) for r in units} == {12}
    summary = rows(tmp_path / "run", "rounds")
    assert summary[0]["gradient_cosine"] and not summary[1]["gradient_cosine"]
    plain = tiny(rounds=1)
    run(plain, tmp_path / "plain")
    assert not (tmp_path / "plain" / "units.csv").exists()


def test_workload_variance_is_reported(tmp_path: Path) -> None:
    run(tiny({"body.plans": "knapsack", "body.knapsack.capacities": "0.3,0.9"}), tmp_path / "run")
    unequal = [float(row["workload_variance"]) for row in rows(tmp_path / "run", "rounds")]
    run(tiny({"body.plans": "knapsack"}), tmp_path / "equal")
    equal = [float(row["workload_variance"]) for row in rows(tmp_path / "equal", "rounds")]
    assert min(unequal) > 0.02 > max(equal)


REFUSED: list[tuple[dict[str, Scalar], str]] = [
    ({"body.plans": "knapsack", "body.knapsack.budget": 0.001}, "raise it to at least"),
    ({"body.plans": "knapsack", "body.knapsack.workers": 99}, "more than the 36 heads"),
    ({"body.plans": "layerdrop", "body.layerdrop.rate": 1.0}, "rate"),
    ({"body.plans": "layerdrop", "cut.shape": "none"}, "set body.scope=all"),
    ({**BANDIT, "data.local-test": 0.0}, "set data.local-test"),
    ({**BANDIT, "devices.flops-per-s": 0.0, "devices.server-flops-per-s": 0.0}, "infinitely"),
    ({**BANDIT, "body.plans": ""}, "no 'layerdrop' is named"),
    ({**BANDIT, "control.bandit.groups": 3}, "more than the 2 devices"),
    ({**BANDIT, "control.bandit.rates": "0.2,0.99"}, "rate"),
]


@pytest.mark.parametrize("keys, words", REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_had_is_refused_at_the_start(keys: dict[str, Scalar], words: str, tmp_path: Path) -> None:
    with pytest.raises(FedsplitError, match=words):
        run(tiny(keys), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_blocks_that_cannot_be_sliced_are_planned_whole(tmp_path: Path) -> None:
    keys: dict[str, Scalar] = {"model.name": "vit_pwee_patch16_reg1_gap_256", "model.image-size": 32}
    keys |= {"model.pretrained": False, "body.plans": "knapsack", "cut.front": 14, "rounds": 1}
    with pytest.raises(FedsplitError, match=r"set body\.knapsack\.units=block"):
        run(tiny(keys), tmp_path / "heads")
    whole = run(tiny(keys, body__knapsack__units="block", local__max_steps=2, data__limit=32), tmp_path / "blocks")
    assert whole["server_flops"] > 0


def test_a_plan_of_the_wrong_shape_is_refused() -> None:
    built = world(tiny())
    with pytest.raises(FedsplitError, match="give one for each unit"):
        built.parts.body(torch.randn(1, 64, 96), None, Plan(((2, 1, 0),) * 8))


def test_old_checkpoints_have_no_controllers() -> None:
    assert State(0, {}).control == {}


def test_compiled_blocks_do_the_same(tmp_path: Path) -> None:
    config = tiny({"body.plans": "layerdrop"}, rounds=1, local__max_steps=2)
    plain = run(config, tmp_path / "plain")
    compiled = run(config.replace(compile="eager"), tmp_path / "compiled")
    assert any(hasattr(block, "compiled") for block in world(config.replace(compile="eager")).backbone.vit.blocks)
    assert plain["accuracy"] == compiled["accuracy"] and plain["server_flops"] == compiled["server_flops"]
    with pytest.raises(FedsplitError, match="no backend"):
        run(config.replace(compile="nonsense"), tmp_path / "nonsense")
