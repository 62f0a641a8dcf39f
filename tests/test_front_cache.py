"""Kept front outputs: the same weights to the bit, within the limits, and the same ledger everywhere."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from identities.small import MODELS
from torch import Tensor

from fedsplit import experiment
from fedsplit.config import Config, resolve
from fedsplit.experiment import start
from fedsplit.front import PENALTIES, cache
from fedsplit.front.cache import FrontCache, Store
from fedsplit.front.vit import Part
from fedsplit.round import run_round
from fedsplit.runs import RunFolder
from fedsplit.runtime.inprocess import Loop, runner
from fedsplit.types import Report, Scalar, Tensors
from fedsplit.world import World, world

SMALL: dict[str, Scalar] = {
    "data.limit": 48,
    "data.test-limit": 10,
    "data.partition": "iid",
    "devices.count": 2,
    "local.batch-size": 7,
    "eval.batch-size": 10,
    "rounds": 2,
}
PROMPTS: dict[str, Scalar] = {"cut.front": 0, "front.edits": "prompts", "train": "tail,prompts"}
ALONE: dict[str, Scalar] = {"local.phases": "self-update", "local.self-update.epochs": 2, "data.select": "el2n"}
SAMPLE = 4 * 5 * 192  # bytes: five tokens of 192 channels
HEAD: dict[str, Scalar] = {"cut.shape": "none", "train": "head", **MODELS["cls"]}
CASES: dict[str, tuple[str, dict[str, Scalar]]] = {
    "tail": ("avg", {"cut.front": 2, "cut.tail": 1, "train": "tail"}),
    "head": ("cls", {"cut.front": 2, "train": "head"}),
    "no blocks": ("cls", {"cut.front": 0, "train": "tail"}),
    "server trains": ("avg", {"cut.front": 2, "train": "body,tail"}),
    "server trains, cls": ("cls", {"cut.front": 0, "train": "body,tail"}),
    "prompts": ("avg", PROMPTS),
    "prompts, cls": ("cls", PROMPTS),
    "prompts with dropout": ("cls", {**PROMPTS, "front.prompts.dropout": 0.5}),
    "prompts at the cut": ("cls", {**PROMPTS, "cut.front": 2, "front.prompts.at": "cut", "front.prompts.dropout": 0.3}),
    "frozen prompts": ("cls", {**PROMPTS, "train": "tail"}),
    "guards that draw": ("cls", {"cut.front": 2, "front.edits": "noise,feature-dropout,shuffle", "train": "body,tail"}),
    "guards behind prompts": ("avg", {**PROMPTS, "front.edits": "prompts,noise", "train": "tail"}),
    "guards behind trained prompts": ("avg", {**PROMPTS, "front.edits": "prompts,shuffle"}),
    "vanilla": ("avg", {"cut.shape": "vanilla", "cut.front": 2, "train": "tail"}),
    "vanilla, server trains": ("cls", {"cut.shape": "vanilla", "cut.front": 0, "train": "body,tail"}),
    "none": ("avg", {"cut.shape": "none", "train": "head"}),
    "none, cls": ("cls", {"cut.shape": "none", "train": "head"}),
}


def small(**changes: Scalar) -> Config:
    return resolve(SMALL).replace(**changes)


@dataclass
class Ran:
    """What two rounds left: everything trained, what the clients remember, and the reports by round and client."""

    built: World
    model: Tensors
    reports: list[Report]


def train(config: Config) -> Ran:
    built = world(config)
    state, reports = start(built), []
    for _ in range(config.rounds):
        outcome = run_round(built, state, 0, Loop(config), lambda _: None)
        assert not outcome.failures, outcome.failures
        state = outcome.state
        reports += [update.report for update in outcome.updates]
    assert any(not torch.equal(value, built.initial[name]) for name, value in state.model.items())
    return Ran(built, state.model, reports)


def same(one: Ran, other: Ran) -> bool:
    def result(report: Report) -> Report:
        return dataclasses.replace(
            report,
            computed_samples=0,
            client_flops=0,
            client_infer_flops=0,
            local_flops=0,
            local_infer_flops=0,
            client_peak_bytes=0,
            stored_bytes=0,
            wall_s=0,
        )

    return (
        one.model.keys() == other.model.keys()
        and all(torch.equal(value, other.model[name]) for name, value in one.model.items())
        and list(map(result, one.reports)) == list(map(result, other.reports))
    )


def kept(ran: Ran) -> Store:
    assert ran.built.cache is not None
    return ran.built.cache.store()


@pytest.mark.parametrize(
    "case, alone",
    [(case, "cut.shape" not in CASES[case][1]) for case in CASES] + [("tail", False), ("prompts, cls", False)],
)
def test_on_and_off_end_in_the_same_weights(case: str, alone: bool) -> None:
    kind, changes = CASES[case]
    values: dict[str, Scalar] = {**MODELS[kind], **changes, **(ALONE if alone else {})}
    on, off = train(small(**values)), train(small(**values, **{"front.cache": False}))
    assert on.built.cache is not None and off.built.cache is None
    draws = any(name in str(changes.get("front.edits")) for name in ("noise", "shuffle"))
    assert on.built.start == ("begun" if "prompts" in str(changes["train"]) or draws else "cut")
    assert same(on, off)
    assert len(kept(on).samples) == 48
    assert [report.computed_samples for report in on.reports] == [24, 24, 0, 0]
    assert all(a.client_flops < b.client_flops for a, b in zip(on.reports[2:], off.reports[2:], strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"front.cache": False, "train": "tail"},
        {"data.augment": "flip", "train": "tail"},
        {"model.dropout": 0.1, "train": "tail"},
        {"model.dropout": 0.1, **PROMPTS},
        {"cut.front": 4, "model.drop-path": 0.2, "train": "tail"},
        {"train": "all"},
        {"train": "front"},
        {"train": "norms"},
        {"train": "biases"},
        {**PROMPTS, "cut.front": 1},
        {**PROMPTS, "train": "front,tail"},
        {"front.edits": "prompts,noise", "front.prompts.deep": True, "front.prompts.dropout": 0.3, "train": "tail"},
        {"front.edits": "prompts", "cut.front": 1, "front.prompts.dropout": 0.3, "train": "tail"},
    ],
    ids=str,
)
def test_it_is_off_where_outputs_change(changes: dict[str, Scalar]) -> None:
    built = world(small(**changes))
    assert built.cache is None and built.start == "images"


def test_it_is_off_with_a_penalty_on_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Nothing:
        """No penalty."""

        def penalty(self, front: Part, x: Tensor, h: Tensor, memory: Any, key: int) -> tuple[Tensor, Any]:
            return h.sum() * 0, memory

    monkeypatch.setitem(PENALTIES, "nothing", Nothing)
    assert world(small(**{"front.penalties": "nothing", "train": "tail"})).cache is None


LIMITS = {
    "nothing": (0, 0, 0),
    "less than a sample": (1, 1, 0),
    "one sample": (1, 0, 1),
    "ten and ten": (10, 10, 20),
    "disk only": (0, 1000, 48),
    "one on disk": (0, 1, 1),
}


@pytest.mark.parametrize("limits", LIMITS)
def test_limits_change_no_bit(limits: str, tmp_path: Path) -> None:
    values: dict[str, Scalar] = {**MODELS["cls"], **ALONE, "cut.front": 2, "train": "tail", "data.cache": str(tmp_path)}
    values["data.el2n.keep"] = 1.0
    off = train(small(**values, **{"front.cache": False}))
    memory, disk, count = LIMITS[limits]
    size = 1 if limits == "less than a sample" else SAMPLE
    on = train(small(**values, **{"front.cache-memory-bytes": memory * size, "front.cache-disk-bytes": disk * size}))
    assert same(on, off)
    assert len(kept(on).samples) == count
    # Each device has the limits for itself; a round passes over its 24 samples three times.
    missed = 24 - min(count, 24)
    assert [report.computed_samples for report in on.reports] == [24 + 2 * missed] * 2 + [3 * missed] * 2


def fill(store: Store, order: list[int]) -> None:
    for begin in range(0, len(order), 4):
        indices = np.array(order[begin : begin + 4])
        _, found = store.get(indices)
        store.put(indices[~found], np.stack([np.full((2, 3), index, np.float32) for index in indices])[~found])


def test_the_kept_set_is_seeded_and_does_not_depend_on_the_order(tmp_path: Path) -> None:
    ranks = cache._ranks(7, 50)
    came = np.random.default_rng(0).permutation(50)[:40]
    sets = []
    for seed in range(4):
        store = Store(ranks, (2, 3), 5 * 24 + 23, 6 * 24, str(tmp_path))
        order = np.random.default_rng(seed).permutation(came).tolist()
        fill(store, order)
        fill(store, order[::-1])
        sets.append(store.samples.tolist())
        out, found = store.get(np.arange(50))
        assert np.flatnonzero(found).tolist() == sets[-1]
        assert torch.equal(out[torch.from_numpy(found)][:, 0, 0], torch.tensor(sets[-1]).float())
    assert sets[0] == sorted(came[ranks[came].argsort()[:11]].tolist())
    assert sets[1:] == sets[:1] * 3
    other = Store(cache._ranks(8, 50), (2, 3), 5 * 24, 6 * 24, str(tmp_path))
    fill(other, came.tolist())
    assert other.samples.tolist() != sets[0]
    assert not list(tmp_path.iterdir())


def test_what_a_device_can_hold_is_seeded_and_its_own() -> None:
    config = small(**HEAD, **{"front.cache-memory-bytes": 3 * SAMPLE, "front.cache-disk-bytes": 4 * SAMPLE})
    built = world(config)
    assert built.cache is not None
    one, other = built.cache.fits(24, 0), built.cache.fits(24, 1)
    assert one.sum() == other.sum() == 7 and (one != other).any()
    assert built.cache.fits(5, 0).all()
    again = world(config.replace(threads=1, **{"local.epochs": 3})).cache
    assert again is not None and (again.fits(24, 0) == one).all()
    reseeded = world(config.replace(seed=1)).cache
    assert reseeded is not None and (reseeded.fits(24, 0) != one).any()


def test_flops_by_hand() -> None:
    depth, c, n, samples = 12, 192, 5, 24
    block = 2 * n * c * 3 * c + 2 * (2 * n * n * c) + 2 * n * c * c + 2 * (2 * n * c * 4 * c)
    front = depth * block + 2 * 4 * 3 * 16**2 * c
    head = 2 * 2 * c * 10
    for limit, first, later in ((10**9, 1, 0), (6 * 4 * n * c, 2 - 6 / 24, 2 * 18 / 24), (0, 2, 2)):
        limits = {"front.cache-memory-bytes": limit, "front.cache-disk-bytes": 0}
        reports = train(small(**HEAD, **limits, **{"local.epochs": 2})).reports
        expected = [samples * (2 * head + passes * front) for passes in (first, first, later, later)]
        assert [report.client_flops for report in reports] == expected


@pytest.mark.slow
def test_processes_and_loop_agree_on_flops(tmp_path: Path) -> None:
    columns = []
    for workers in (1, 2):
        values = {"out": str(tmp_path / str(workers)), "engine.workers": workers, "devices.count": 3}
        config = small(**HEAD, **values, **{"front.cache-memory-bytes": 10 * SAMPLE, "front.cache-disk-bytes": 0})
        clients = runner(config)
        try:
            rows = RunFolder(experiment.run(config, clients)).rows("clients")
        finally:
            clients.close()
        columns.append([(row["round"], row["client"], row["client_flops"]) for row in rows])
    assert columns[0] == columns[1] and len(columns[0]) == 6
    assert columns[0][0][2] != columns[0][3][2], "the second round computes less"


def batch_matters(embed: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(part: Part, x: Tensor, noise: int | None = None) -> Tensor:
        return embed(part, x, noise) + 1e-3 * x.mean()

    return run


def test_a_front_that_mixes_samples_is_computed_always(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Part, "embed", batch_matters(Part.embed))
    on = train(small(**HEAD, seed=3))
    assert on.built.cache is not None and not on.built.cache.sound
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    off = train(small(**HEAD, seed=3, **{"front.cache": False}))
    assert same(on, off)
    assert [one.client_flops for one in on.reports] == [one.client_flops for one in off.reports]


def test_a_full_disk_costs_time_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    values: dict[str, Scalar] = {**HEAD, "data.cache": str(tmp_path), "front.cache-memory-bytes": 10 * SAMPLE}
    off = train(small(**values, **{"front.cache": False}))
    monkeypatch.setattr(cache, "_nameless", lambda _: (FileIO("/dev/full", "r+"), 10**9))
    full = train(small(**values))
    assert same(full, off) and len(kept(full).samples) == 10
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_disk_that_cannot_be_written_costs_time_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache.store, "folder", lambda _: None)
    monkeypatch.setattr(cache.tempfile, "TemporaryFile", refuse)
    store = Store(np.arange(8), (2, 3), 24, 1000)
    fill(store, list(range(8))[::-1])
    assert store.samples.tolist() == [0]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_file_that_breaks_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(np.arange(8), (2, 3), 2 * 24, 1000, str(tmp_path))
    fill(store, list(range(8)))
    assert store._file is not None and len(store.samples) == 8
    os.ftruncate(store._file.fileno(), 30)  # one and a bit of six rows
    assert store.get(np.arange(8))[1].tolist() == [True] * 3 + [False] * 5
    os.close(store._file.fileno())
    assert store.get(np.arange(8))[1].tolist() == [True] * 2 + [False] * 6
    assert store.samples.tolist() == [0, 1] and store.rows == 2 and len(caplog.records) == 1
    fill(store, list(range(8)))
    assert store.samples.tolist() == [0, 1]


def test_the_file_goes_with_its_world(tmp_path: Path) -> None:
    values: dict[str, Scalar] = {**HEAD, "data.cache": str(tmp_path), "front.cache-memory-bytes": 0}
    file = kept(train(small(**values)))._file
    assert file is not None and not file.closed
    world(small(**HEAD, seed=5))
    assert file.closed


def test_no_file_is_left_behind_by_a_killed_process(tmp_path: Path) -> None:
    program = f"""
import os, signal
import numpy as np
from fedsplit.front.cache import Store
store = Store(np.arange(8), (2, 3), 0, 1000, {str(tmp_path)!r})
store.put(np.arange(8), np.ones((8, 2, 3), np.float32))
assert len(store.samples) == 8 and store.get(np.arange(8))[1].all()
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_forked_process_has_a_store_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = train(small(**HEAD))
    before = kept(ran)
    assert kept(ran) is before
    monkeypatch.setattr(cache.os, "getpid", lambda: -1)
    assert kept(ran) is not before and not len(kept(ran).samples)


def test_a_changed_front_is_a_bug() -> None:
    built = world(small(**HEAD, seed=11))
    front: FrontCache | None = built.cache
    assert front is not None
    front.tokens(np.arange(3))
    with torch.no_grad():
        next(iter(built.parts.front.parameters())).mul_(1)
    with pytest.raises(RuntimeError, match="frozen parameter"):
        front.tokens(np.arange(3))


def test_tokens_of_a_look_are_fit_for_training() -> None:
    built = world(small(**HEAD, seed=12))
    assert built.cache is not None
    with torch.inference_mode():
        seen = built.cache.tokens(np.arange(6))
    again = built.cache.tokens(np.arange(3, 9))
    assert torch.equal(seen[3:], again[:3]) and not again.is_inference() and again.is_contiguous()
    twice = built.cache.tokens(np.array([20, 20, 1]))
    assert torch.equal(twice[0], twice[1]) and torch.equal(twice[2], seen[1])
