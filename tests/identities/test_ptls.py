"""Personalised layer sharing: all shared is FedAvg, none is local training, and what is between."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import SMALL, small, tensors_of

from fedsplit import experiment, personal
from fedsplit.body.seat import Seat
from fedsplit.client import client_round, work
from fedsplit.config import Config, resolve
from fedsplit.progress import Silent
from fedsplit.round import Outcome, State, run_round
from fedsplit.runtime.flower_ray import read_job, read_reply, write_job, write_update
from fedsplit.runtime.inprocess import Loop, Pool
from fedsplit.share.gate import Refused, admit
from fedsplit.share.ptls import Ptls
from fedsplit.types import FedsplitError, Job, Scalar, Tensors
from fedsplit.wire.frame import pack, unpack
from fedsplit.wire.link import Link
from fedsplit.world import World, world

TWO: dict[str, Scalar] = {"devices.count": 2, "local.max-steps": 2, "cut.tail": 1, "model.image-size": 16}
PTLS: dict[str, Scalar] = {**TWO, "share.partial": "ptls"}
NONE: dict[str, Scalar] = {**PTLS, "share.ptls.keep": 0.0, "share.ptls.head": "personal"}
HALF_GRADIENT: dict[str, Scalar] = {**PTLS, "share.ptls.by": "gradient"}
SHAPES: list[dict[str, Scalar]] = [{}, {"cut.shape": "vanilla", "cut.tail": 0}, {"cut.shape": "none"}]


def config(values: dict[str, Scalar], *more: dict[str, Scalar]) -> Config:
    merged = {**SMALL, **values}
    for one in more:
        merged |= one
    return resolve(merged)


def rounds(settings: Config, count: int) -> tuple[World, list[Outcome]]:
    """The outcomes of the first rounds, in this process."""
    built = world(settings)
    state, outcomes = experiment.start(built), []
    for _ in range(count):
        outcomes.append(run_round(built, state, 0, Loop(settings), lambda _: None))
        assert not outcomes[-1].failures, outcomes[-1].failures
        state = outcomes[-1].state
    return built, outcomes


def own(state: State, client: int) -> Tensors:
    """What a client has of its own, on both sides."""
    return personal.own(state.memory.get(client, b"")) | personal.own_at_server(state.notes.get(client, b""))


def shared_blocks(settings: Config, names: set[str]) -> set[int | None]:
    return {personal.block_of(name) for name in names}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by", ["depth", "gradient"])
def test_all_shared_is_fedavg(by: str, shape: dict[str, Scalar]) -> None:
    all_shared: dict[str, Scalar] = {"share.partial": "ptls", "share.ptls.keep": 1.0, "share.ptls.by": by}
    (_, with_ptls), (_, without) = (rounds(config(TWO, shape, more), 2) for more in (all_shared, {}))
    for one, other in zip(with_ptls, without, strict=True):
        assert not one.state.notes and one.state.memory == other.state.memory
        assert all(torch.equal(one.state.model[name], value) for name, value in other.state.model.items())
        assert [u.report.bytes for u in one.updates] == [u.report.bytes for u in other.updates]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_none_shared_is_local_training(shape: dict[str, Scalar]) -> None:
    built, outcomes = rounds(config(NONE, shape), 3)
    fresh = experiment.start(built).model
    plain = world(config(TWO, shape))
    for client in range(2):
        model = dict(fresh)
        for number in (1, 2, 3):
            down, server = (pack({name: model[name] for name in side}) for side in (plain.client, plain.server))
            model = tensors_of(client_round(plain, Job(client, number, 0, down, server)))
            kept = own(outcomes[number - 1].state, client)
            assert kept.keys() == model.keys()
            assert all(torch.equal(kept[name], value) for name, value in model.items())
    last = outcomes[-1]
    assert all(torch.equal(last.state.model[name], value) for name, value in fresh.items())
    assert all(update.up == b"" and update.report.bytes["parameters-up"] == 0 for update in last.updates)
    assert [update.report.bytes["parameters-down"] for update in last.updates] == [0, 0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("values", [PTLS, HALF_GRADIENT], ids=["depth", "gradient"])
def test_clients_keep_some_layers_and_share_the_others(values: dict[str, Scalar], shape: dict[str, Scalar]) -> None:
    settings = config(values, shape)
    built, outcomes = rounds(settings, 2)
    depth = built.cut.depth
    state, names = outcomes[-1].state, {*built.client, *built.server}
    kept = [own(state, client) for client in range(2)]
    for update in outcomes[-1].updates:
        sent = tensors_of(update)
        assert sent.keys() == names - kept[update.client].keys(), "all but what it keeps"
        assert len(shared_blocks(settings, set(sent)) - {None}) == depth // 2
        assert None in shared_blocks(settings, set(sent)) - shared_blocks(settings, set(kept[update.client]))
    both = kept[0].keys() & kept[1].keys()
    assert both and all(not torch.equal(kept[0][name], kept[1][name]) for name in both if name.endswith("weight"))
    if values is PTLS:
        assert shared_blocks(settings, set(kept[0])) == set(range(depth // 2, depth)) and both == kept[0].keys()
        assert all(torch.equal(state.model[name], experiment.start(built).model[name]) for name in both)


def test_the_less_important_blocks_of_each_side_are_shared() -> None:
    """One step without momentum: the squared gradients are those of the step's movement."""
    settings = config(HALF_GRADIENT, {"devices.count": 1, "local.max-steps": 1, "optimizer.momentum": 0.0})
    built, outcomes = rounds(settings, 1)
    fresh, update = experiment.start(built).model, outcomes[0].updates[0]
    kept = own(outcomes[0].state, 0)
    after = tensors_of(update) | kept
    for side in (built.client, built.server):
        size: dict[int, float] = {}
        for name in side:
            number = personal.block_of(name)
            if number is not None:
                size[number] = size.get(number, 0.0) + float((after[name] - fresh[name]).double().square().sum())
        ranked = sorted(size, key=lambda number: size[number])
        personal_ones = {personal.block_of(name) for name in kept if name in side}
        assert personal_ones == set(ranked[round(len(ranked) / 2) :])


def test_a_returning_client_trains_its_own_copy_and_a_new_one_takes_all() -> None:
    settings = config(PTLS, {"devices.per-round": 1, "devices.count": 3, "seed": 5})
    _, outcomes = rounds(settings, 4)
    taken = [outcome.updates[0].client for outcome in outcomes]
    assert len(set(taken)) < len(taken) and len(set(taken)) > 1, "some come again, and more than one comes"
    down = [outcome.updates[0].report.bytes["parameters-down"] for outcome in outcomes]
    up = [outcome.updates[0].report.bytes["parameters-up"] for outcome in outcomes]
    assert len(set(up)) == 1
    for place, client in enumerate(taken):
        assert (down[place] == up[place]) == (client in taken[:place]), "the first time it takes everything"
    # By hand: shared from the server, the rest from its last round.
    again = next(place for place in range(4) if taken[place] in taken[:place])
    before, plain = outcomes[again - 1].state, world(settings.replace(share__partial=""))
    model = before.model | own(before, taken[again])
    frames = [pack({name: model[name] for name in side}) for side in (plain.client, plain.server)]
    hand = tensors_of(client_round(plain, Job(taken[again], again + 1, 0, *frames)))
    found = tensors_of(outcomes[again].updates[0]) | own(outcomes[again].state, taken[again])
    assert found.keys() == hand.keys() and all(torch.equal(found[name], value) for name, value in hand.items())


def test_a_failed_client_keeps_what_it_had() -> None:
    settings = config(PTLS, {"engine.faults": "nan:1@2", "rounds": 2})
    built = world(settings)
    first = run_round(built, experiment.start(built), 0, Loop(settings), lambda _: None).state
    second = run_round(built, first, 0, Loop(settings), lambda _: None)
    assert [failure.client for failure in second.failures] == [1]
    assert second.state.memory[1] == first.memory[1] and second.state.notes[1] == first.notes[1]
    assert second.state.memory[0] != first.memory[0] and second.state.notes[0] != first.notes[0]


class Stop(Silent):
    """Ends a run in its third round, before that round's checkpoint."""

    def row(self, row: Mapping[str, Any]) -> None:
        if row["round"] == 3:
            raise KeyboardInterrupt


TESTED: dict[str, Scalar] = {"rounds": 4, "devices.count": 3, "devices.per-round": 2, "local.max-steps": 1}
TESTED |= {"data.local-test": 0.2, "eval.per-client": True, "share.ptls.head": "personal", "eval.every": 9}


@pytest.mark.parametrize("by", ["depth", "gradient"])
def test_two_rounds_and_two_more_are_four(by: str, tmp_path: Path) -> None:
    settings = config(PTLS, TESTED, {"share.ptls.by": by})
    whole = experiment.run(settings.replace(out=str(tmp_path / "whole")), Loop(settings))
    with pytest.raises(KeyboardInterrupt):
        experiment.run(settings.replace(out=str(tmp_path / "part")), Loop(settings), progress=Stop())
    part = experiment.run(settings.replace(resume=str(tmp_path / "part")), Loop(settings))
    for name in ("checkpoint/round-000004/state.safetensors", "model.safetensors", "ledger.csv", "personal.csv"):
        assert (whole / name).read_bytes() == (part / name).read_bytes(), name


def test_every_device_is_tested_with_its_own_model(tmp_path: Path) -> None:
    settings = config(PTLS, TESTED, {"rounds": 1, "devices.per-round": 1, "optimizer.lr": 0.3})
    path = experiment.run(settings.replace(out=str(tmp_path / "run")), Loop(settings))
    with (path / "personal.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    built, outcomes = rounds(settings, 1)
    [update], state = outcomes[0].updates, outcomes[0].state
    for row in rows:
        client = int(row["client"])
        assert row["rounds"] == str(int(client == update.client)) and int(row["samples"]) == len(built.held_out[client])
        built.load(state.model | (own(state, client) if client == update.client else {}))
        assert float(row["accuracy"]) == personal.accuracy(built, client)
    summary = json.loads((path / "summary.json").read_text())
    assert summary["personal_accuracy_all"] == pytest.approx(sum(float(row["accuracy"]) for row in rows) / 3)
    trained = next(row for row in rows if int(row["client"]) == update.client)
    assert float(trained["accuracy"]) == update.report.personal_accuracy, "alone in its round, it ends as it was tested"


@pytest.mark.slow
def test_a_process_pool_trains_the_same(tmp_path: Path) -> None:
    settings = config(HALF_GRADIENT, {"rounds": 2, "engine.workers": 2, "eval.every": 9})
    pool = Pool(settings)
    try:
        paths = [
            experiment.run(settings.replace(out=str(tmp_path / name)), runner)
            for name, runner in (("loop", Loop(settings)), ("pool", pool))
        ]
    finally:
        pool.close()
    for name in ("checkpoint/round-000002/state.safetensors", "ledger.csv"):
        assert (paths[0] / name).read_bytes() == (paths[1] / name).read_bytes(), name


def test_own_layers_travel_in_flowers_messages() -> None:
    settings = config(PTLS)
    _, outcomes = rounds(settings, 1)
    update = outcomes[0].updates[1]
    job = Job(1, 2, 0, update.up, b"", update.memory, update.notes)
    assert read_job(write_job(settings, job))[1] == job and job.notes
    reply: Any = type("Reply", (), {"has_error": lambda self: False, "content": write_update(update)})()
    assert read_reply(reply, job) == update


GATE: dict[str, Scalar] = {**PTLS, "train": "all"}


def refused(change: Any, values: dict[str, Scalar] = GATE) -> str:
    """What the gate says to the first client's update after `change` (up, server, notes)."""
    built, outcomes = rounds(config(values), 1)
    update, fresh = outcomes[0].updates[0], experiment.start(built).model
    up, server, notes = unpack(update.up), unpack(update.server), unpack(update.notes)
    change(up, server, notes)
    sides = [{name: fresh[name] for name in side} for side in (built.client, built.server)]
    bad = replace(update, up=pack(up), server=pack(server), notes=pack(notes))
    with pytest.raises(Refused) as said:
        admit(bad, Link({}), *sides, 10**9, personal.may_withhold(built))
    return str(said.value)


def test_the_gate_lets_only_personal_parameters_be_missing() -> None:
    low, high, head = "blocks.0.attn.qkv.weight", "blocks.5.attn.qkv.weight", "head.weight"
    assert f"lacks parameter '{head}'" in refused(lambda up, server, notes: up.pop(head))
    assert f"lacks parameter '{low}'" in refused(lambda up, server, notes: up.pop(low))
    assert f"lacks parameter '{high}'" in refused(lambda up, server, notes: notes.pop(high))
    assert "was not asked for" in refused(lambda up, server, notes: up.update({"blocks.99.x": torch.zeros(1)}))
    assert "was not asked for" in refused(lambda up, server, notes: notes.update({low: torch.zeros(1)}))
    assert "instead of" in refused(lambda up, server, notes: notes.update({high: torch.zeros(1)}))
    assert "not finite" in refused(lambda up, server, notes: notes[high].fill_(float("nan")))
    everything = {**GATE, "share.partial": ""}
    assert f"lacks parameter '{low}'" in refused(lambda up, server, notes: up.pop(low), everything)


@pytest.mark.parametrize("schedule", ["splitfed-v2", "sequential"])
def test_clients_that_take_turns_at_one_model_have_none_of_their_own(schedule: str) -> None:
    settings = config(PTLS, {"server.schedule": schedule})
    with pytest.raises(FedsplitError, match="share.partial needs a model for every client"):
        experiment.check(settings, world(settings))
    neutral = settings.replace(share__ptls__keep=1.0)
    experiment.check(neutral, world(neutral))


def test_a_client_that_lost_its_own_layers_says_so() -> None:
    settings = config(PTLS)
    built, outcomes = rounds(settings, 1)
    update = outcomes[0].updates[0]
    with pytest.raises(FedsplitError, match="no copy of its own parameter"):
        client_round(built, Job(0, 2, 0, update.up, b"", b"", update.notes))


def test_adapters_and_prompts(tmp_path: Path) -> None:
    """Adapters are of their block, prompts of none, wherever they are put in."""
    edits: dict[str, Scalar] = {"body.edits": "lora", "front.edits": "prompts", "front.prompts.deep": True}
    settings = config(PTLS, edits, {"train": "lora,prompts,head", "cut.front": 1})
    _, outcomes = rounds(settings, 2)
    for update in outcomes[-1].updates:
        sent, kept = tensors_of(update), own(outcomes[-1].state, update.client)
        assert {name for name in (*sent, *kept) if "prompt" in name} <= sent.keys()
        assert kept and all(".lora_" in name for name in kept)
    mine = rounds(settings.replace(share__ptls__head="personal"), 1)[1][0]
    assert all(".lora_" in name for name in tensors_of(mine.updates[0]))


def test_a_small_config_is_unchanged_without_the_piece() -> None:
    built = world(small())
    assert not personal.may_withhold(built) and personal.foreseen(built) and personal.watches(built) == (None, None)


def test_blocks_by_hand() -> None:
    importance = torch.tensor([3.0, 1.0, 2.0, 1.0], dtype=torch.float64)
    blocks = [2, 3, 4, 7]
    assert Ptls().shared(importance, blocks, 8) == {2, 3}
    assert Ptls(by="gradient").shared(importance, blocks, 8) == {3, 7}
    assert Ptls(by="gradient", keep=0.25).shared(importance, blocks, 8) == {3}, "the lower of two that are alike"
    assert Ptls(keep=0.0).shared(importance, blocks, 8) == frozenset()


def test_steps_alone_count_for_the_importance_too() -> None:
    alone: dict[str, Scalar] = {"local.phases": "self-update", "local.epochs": 0, "devices.count": 1}
    built = world(config(HALF_GRADIENT, alone, {"local.self-update.epochs": 1}))
    watches = personal.watches(built)
    fresh = experiment.start(built).model
    built.load(fresh)
    client, server = watches
    job = Job(0, 1, 0, b"", b"")
    work(built, job, Link({}), Seat.take(built, job, watch=server).body, watch=client)
    assert client and client.sums.keys() == {0, 1, 7} and min(client.sums.values()) > 0
    assert server and not server.sums
