"""Controllers that choose for every client: their formulas by hand, and what their choices do to a run."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedsplit import experiment
from fedsplit.client import client_share
from fedsplit.config import Config, resolve
from fedsplit.control import CONTROLLERS, steer
from fedsplit.control.bandwidth import Bandwidth
from fedsplit.control.batch_size import BatchSize
from fedsplit.control.by_kind import ByKind
from fedsplit.control.facts import Facts, Load
from fedsplit.control.importance import Importance, divergence, ranked
from fedsplit.control.loads import load_of
from fedsplit.control.staleness import Staleness
from fedsplit.experiment import check, start
from fedsplit.plan import account
from fedsplit.rng import key
from fedsplit.runtime.inprocess import Loop, Pool
from fedsplit.types import FedsplitError, Scalar
from fedsplit.world import steered, world

RECOVER, TOPK, BATCH = "wire.recover.keep", "wire.topk.keep", "local.batch-size"
FLEET: dict[str, Scalar] = {"devices.fleet": "jetson-nano:1,agx-orin:1", "devices.jitter": 0.3}
CAESAR: dict[str, Scalar] = {
    "model.name": "fedsplit_nano",
    "model.pretrained": False,
    "data.limit": 120,
    "data.test-limit": 20,
    "data.alpha": 0.5,
    "data.min-samples": 8,
    "data.allow-missing-classes": True,
    "devices.count": 4,
    "devices.per-round": 2,
    "rounds": 3,
    "cut.shape": "none",
    "local.epochs": 9,
    "local.max-steps": 2,
    "share.merge": "uniform",
    "wire.parameters-down": "recover",
    "wire.parameters-up": "delta,topk",
    "control.tune": "staleness,importance,batch-size",
    "control.batch-size.high": 6,
    "eval.every": 9,
    **FLEET,
}


@dataclass(frozen=True)
class Rates:
    """A device of so many seconds a FLOP, a byte down and a byte up."""

    flop: float = 0.0
    down: float = 0.0
    up: float = 0.0
    latency_s: float = 0.0
    name: str = "toy"

    def train_s(self, flops: float) -> float:
        return flops * self.flop

    def download_s(self, count_bytes: float) -> float:
        return count_bytes * self.down

    def upload_s(self, count_bytes: float) -> float:
        return count_bytes * self.up


def facts(number: int, last: tuple[int, ...], **more: Any) -> Facts:
    return Facts(number, tuple(range(len(last))), (1,) * len(last), last, 10, **more)


def plain(**values: float) -> Load:
    none = {"down_bytes": 0, "up_bytes": 0, "fixed_flops": 0.0, "sample_flops": 0.0, "sample_down_bytes": 0.0}
    return Load(**{**none, "sample_up_bytes": 0.0, "server_s": 0.0, "messages": 0, **values})  # type: ignore[arg-type]


def test_staleness_sends_a_newcomer_everything_and_a_regular_the_least() -> None:
    choices, _ = Staleness().assign(facts(10, (0, 5, 9)), {}, 0)
    assert [choices[client][RECOVER] for client in range(3)] == pytest.approx([1.0, 0.7, 0.46])
    assert choices[0][RECOVER] == 1.0, "exact, not nearly"
    # For one that never misses a round the share grows with t: (t - 1) / t of the largest.
    shares = [Staleness().ratio(number, number - 1) for number in range(1, 50)]
    assert shares == pytest.approx([0.6 * (t - 1) / t for t in range(1, 50)]) and max(shares) < 0.6


LABELS = ((5.0, 5.0), (5.0, 0.0), (10.0, 0.0), (2.0, 2.0))


def test_importance_by_hand() -> None:
    # KL of one class of two against uniform is ln 2, so its term is 1 / 2.
    piece = Importance()
    scores = piece.scores((10, 5, 10, 5), LABELS)
    assert scores == pytest.approx([1.0, 0.5, 0.75, 0.75])
    assert ranked(scores) == [1, 4, 2, 3], "of equal ones the lower id is ahead"
    told = Facts(1, (1, 2, 3), (10, 5, 10, 5), (0,) * 4, 1, LABELS)
    choices, memory = piece.assign(told, {}, 0)
    # theta = 0.1 + 0.5 / 4 * rank, rank over all four devices, three of which take part
    assert {client: values[TOPK] for client, values in choices.items()} == pytest.approx({1: 0.4, 2: 0.65, 3: 0.525})
    memory = json.loads(json.dumps(memory))
    later = Facts(2, (0,), (10, 5, 10, 5), (0, 1, 1, 1), 1)  # labels are said once
    assert piece.assign(later, memory, 0)[0][0][TOPK] == pytest.approx(0.775)


def test_divergence_from_the_global_mixture() -> None:
    assert divergence((3, 1), (1, 1)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert divergence((0, 0), (1, 1)) == 0.0
    even, skewed = Importance(reference="global", weight=0.0).scores((8, 8), ((6.0, 2.0), (6.0, 2.0)))
    assert even == skewed == 1.0, "all devices alike are like their sum, however skewed"
    assert Importance(weight=0.0).scores((8, 8), ((6.0, 2.0), (6.0, 2.0)))[0] < 1.0


def test_what_a_device_reveals_of_its_labels() -> None:
    counts = (30, 0, 7)
    assert Importance().reveal(counts, 1) == (30.0, 0.0, 7.0)
    assert Importance(labels="none").reveal(counts, 1) == ()
    assert Importance(labels="none").scores((10, 5), ()) == [1.0, 0.5]
    noisy = Importance(labels="noisy", epsilon=0.5)
    one, again, other = (noisy.reveal(counts, stream) for stream in (1, 1, 2))
    assert one == again != other and min(one) >= 0.0
    draws = [noisy.reveal((1000,), key(0, "draw", number))[0] - 1000 for number in range(2000)]
    # Laplace noise of scale b = 2 has mean 0 and mean magnitude b.
    assert abs(sum(draws) / 2000) < 0.3 and sum(map(abs, draws)) / 2000 == pytest.approx(2.0, rel=0.1)
    quiet = Importance(labels="noisy", epsilon=1e6).reveal(counts, 1)
    assert quiet == pytest.approx((30, 0, 7), abs=1e-3)


def test_batches_are_set_so_that_clients_are_done_together() -> None:
    # Ten steps. Client 0: 2 s of transfers, 0.1 s a sample; client 1: 4 s and 0.2 s; client 2 needs longer than
    # that to receive the model.
    devices = (Rates(flop=0.1, down=1.0), Rates(flop=0.2, up=1.0), Rates(flop=0.1, down=1.0))
    loads = {
        0: plain(down_bytes=2, sample_flops=1.0),
        1: plain(up_bytes=4, sample_flops=1.0),
        2: plain(down_bytes=99, sample_flops=1.0),
    }
    told = facts(1, (0, 0, 0), devices=devices, loads=loads)

    def sizes(**knobs: Any) -> list[Any]:
        choices, _ = BatchSize(**{"high": 10, **knobs}).assign(told, {}, 0)
        return [choices[client][BATCH] for client in range(3)]

    assert sizes() == [10, 4, 1]  # (2 + 10 * 10 * 0.1 - 4) / (10 * 0.2) = 4
    assert sizes(low=5) == [10, 5, 5]
    assert sizes(over="step") == [10, 5, 10], "the steps alone, as MergeSFL does"
    assert sizes(low=7, high=7) == [7, 7, 7]
    rows = BatchSize(high=10).assign(told, {}, 0)[1]["told"]
    assert [row["predicted_s"] for row in rows] == pytest.approx([12.0, 12.0, 100.0])


def test_activations_count_in_the_time_of_a_sample() -> None:
    device = Rates(flop=2.0, down=3.0, up=5.0, latency_s=0.5)
    load = plain(sample_flops=1, sample_down_bytes=10, sample_up_bytes=100, server_s=7, messages=4, fixed_flops=6)
    told = facts(1, (0,), devices=(device,), loads={0: load})
    assert told.sample_s(0) == 2 + 30 + 500 + 7
    assert told.overhead_s(0) == 12 + 10 * 4 * 0.5 and told.transfer_s(0) == 2 * 0.5


def test_infinitely_fast_devices_get_the_largest_batch_and_send_the_most() -> None:
    told = facts(1, (0, 0), devices=(Rates(), Rates()), loads={0: plain(), 1: plain()})
    assert BatchSize(high=9).assign(told, {}, 0)[0] == {0: {BATCH: 9}, 1: {BATCH: 9}}
    assert [v[TOPK] for v in Bandwidth().assign(told, {}, 0)[0].values()] == [0.9, 0.9]


def test_bandwidth_lets_clients_send_as_long_as_the_fastest() -> None:
    told = facts(1, (0, 0, 0), devices=(Rates(up=1.0), Rates(up=1.5), Rates(up=9.0)))
    choices, _ = Bandwidth().assign(told, {}, 0)
    assert [choices[client][TOPK] for client in range(3)] == pytest.approx([0.9, 0.6, 0.4])


def test_ratios_of_zero_keep_everything() -> None:
    told = facts(7, (0, 3, 6), devices=(Rates(up=1.0), Rates(up=2.0), Rates(up=3.0)), labels=LABELS[:3])
    pieces = (Staleness(high=0.0), Importance(low=0.0, high=0.0), Bandwidth(low=0.0, high=0.0))
    for piece in pieces:
        choices, _ = piece.assign(told, {}, 0)
        assert all(value == 1.0 for values in choices.values() for value in values.values())


@pytest.mark.parametrize("piece", [Importance, Bandwidth, BatchSize])
def test_bounds_that_are_the_wrong_way_round(piece: Any) -> None:
    with pytest.raises(FedsplitError, match="is more than high"):
        piece(low=2 if piece is BatchSize else 0.5, high=1 if piece is BatchSize else 0.4)


KIND = {"by-kind": lambda: ByKind("toy: local.batch-size=4, wire.topk.keep=0.5")}
ASSIGN = [name for name, piece in CONTROLLERS.items() if hasattr(piece, "assign")]


@pytest.mark.parametrize("name", ASSIGN)
def test_a_controller_chooses_its_keys_for_the_clients_of_the_round(name: str) -> None:
    piece: Any = KIND.get(name, CONTROLLERS[name])()
    devices = tuple(Rates(0.1 * d, 0.2 * d, 0.3 * d) for d in range(1, 5))
    loads = {client: plain(down_bytes=5, up_bytes=5, sample_flops=3.0) for client in (1, 3)}
    told = Facts(4, (1, 3), (10, 5, 10, 5), (0, 1, 2, 3), 2, LABELS, devices, loads)
    choices, memory = piece.assign(told, {}, 0)
    assert set(choices) == {1, 3} and all(set(values) == set(piece.keys) for values in choices.values())
    ends = [set(choice) for choice in piece.choices]
    assert ends and all(end == set(piece.keys) for end in ends)
    again, after = piece.assign(told, json.loads(json.dumps(memory)), 0)
    assert again == choices and after == memory == json.loads(json.dumps(memory))
    rows = piece.rows(memory, 4)
    assert [row["client"] for row in rows] == [1, 3] and all(tuple(row) == piece.columns for row in rows)
    assert piece.rows(memory, 3) == []
    resolve({name: value for choice in piece.choices for name, value in choice.items()})


@pytest.mark.parametrize("name", ASSIGN)
def test_what_was_chosen_is_drawn(name: str, tmp_path: Path) -> None:
    piece: Any = CONTROLLERS[name]()
    rows = [{column: 1 + number for column in piece.columns} for number in range(3)]
    assert piece.draw(rows, tmp_path / "picture.png").stat().st_size > 1000


def caesar(**changes: Scalar) -> Config:
    return resolve(CAESAR).replace(**changes)


def test_the_order_of_clients_and_of_controllers_decides_nothing() -> None:
    built = world(caesar())
    memories = {steer.LAST: {"0": 1, "2": 3}}
    one, after = steer.propose(built, memories, 4, [2, 0, 3])
    other, _ = steer.propose(built, memories, 4, [3, 2, 0])
    assert one == other and sorted(one) == [0, 2, 3]
    turned = world(caesar(control__tune="batch-size,importance,staleness"))
    assert steer.propose(turned, memories, 4, [0, 2, 3])[0] == one, "batches are set when the ratios are known"
    assert set(after) == {steer.LAST, "staleness", "importance", "batch-size"}
    assert steer.propose(built, json.loads(json.dumps(after)), 5, [0]) == steer.propose(built, after, 5, [0])


def test_a_coarser_wire_leaves_time_for_larger_batches() -> None:
    """The time model knows how many bytes are sent under the other controllers' choices."""
    slow = {"devices.fleet": "", "devices.jitter": 0.0, "devices.flops-per-s": 1e9, "devices.up-bytes-per-s": 1e4}
    sent = []
    for tune in ("batch-size", "importance,batch-size"):
        built = world(resolve({**CAESAR, **slow, "control.tune": tune, "wire.topk.keep": 1.0}))
        _, after = steer.propose(built, {}, 1, range(4))
        sent.append(max(row["predicted_s"] for row in after["batch-size"]["told"]))
    assert sent[1] < 0.95 * sent[0]


def test_who_failed_keeps_its_old_round() -> None:
    config = caesar(engine__faults="raise:0@2", rounds=2, devices__per_round=0)
    built, state = world(config), start(world(config))
    for _ in range(2):
        state = experiment.run_round(built, state, 0, Loop(config), lambda _: None).state
    assert state.control[steer.LAST] == {"0": 1, "1": 2, "2": 2, "3": 2}


def rows(folder: Path, table: str) -> list[dict[str, str]]:
    with (folder / f"{table}.csv").open(newline="") as source:
        return list(csv.DictReader(source))


def digest(folder: Path) -> tuple[Any, ...]:
    summary = json.loads((folder / "summary.json").read_text())
    return summary["weights_sha256"], summary["ledger_sha256"], (folder / "choices.csv").read_text()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = caesar(out=str(tmp_path_factory.mktemp("caesar") / "run"))
    return experiment.run(config, Loop(config))


def chosen(run: Path, column: str) -> dict[tuple[str, str], float]:
    return {(row["round"], row["client"]): float(row[column]) for row in rows(run, "choices") if row[column]}


def test_choices_reach_bytes_and_steps_of_their_client(run: Path) -> None:
    built, sent = world(caesar()), {}
    keep, batch = ({}, chosen(run, "batch"))
    for row in rows(run, "choices"):
        if row["keep"]:
            keep[row["round"], row["client"], row["controller"]] = float(row["keep"])
    clients = [row for row in rows(run, "clients") if not row["failure"]]
    assert len(clients) == 6 and len(set(batch.values())) > 1
    for row in clients:
        place = (row["round"], row["client"])
        assert int(row["steps"]) == 2
        if len(built.shards[int(row["client"])]) >= 2 * batch[place]:
            assert int(row["client_flops"]) == client_share(built)[0] * 2 * batch[place]
        sent.setdefault(keep[(*place, "importance")], set()).add(int(row["bytes_parameters_up"]))
        exact = keep[(*place, "staleness")] == 1.0
        down = int(row["bytes_parameters_down"])
        whole = sum(p.numel() * 4 for p in built.client.values())
        assert (down >= whole) == exact and (exact or down > (keep[(*place, "staleness")] * 0.9) * whole)
    sizes = [max(sent[share]) for share in sorted(sent)]
    assert all(len(each) == 1 for each in sent.values()) and sizes == sorted(sizes) and len(sizes) > 1


def test_a_run_agrees_with_its_plan(run: Path) -> None:
    planned = account(caesar())
    clients = rows(run, "clients")
    assert planned.estimated == ()
    for stream, count in planned.bytes.items():
        assert count == sum(int(row[f"bytes_{stream.replace('-', '_')}"]) for row in clients), stream
    assert planned.client_flops == sum(int(row["client_flops"]) for row in clients)
    assert planned.virtual_s == pytest.approx(json.loads((run / "summary.json").read_text())["virtual_s"])


def test_the_time_model_is_that_of_the_virtual_clock(run: Path) -> None:
    built, batch, predicted = world(caesar()), chosen(run, "batch"), chosen(run, "predicted_s")
    clients = {(row["round"], row["client"]): float(row["virtual_s"]) for row in rows(run, "clients")}
    enough = [place for place in clients if len(built.shards[int(place[1])]) >= 2 * batch[place]]
    assert len(enough) >= 3
    for place in enough:
        assert clients[place] == pytest.approx(predicted[place], rel=0.02), "but for the heads of frames"


@pytest.mark.slow
def test_a_resumed_run_and_a_pool_do_the_same(run: Path, tmp_path: Path) -> None:
    part = caesar(rounds=1, out=str(tmp_path / "run"))
    pool = Pool(part)
    try:
        experiment.run(part, pool)
        whole = part.replace(rounds=3, resume=str(tmp_path / "run"))
        experiment.run(whole, pool)
    finally:
        pool.close()
    assert digest(tmp_path / "run") == digest(run)


def test_ratios_of_zero_equal_no_controllers(tmp_path: Path) -> None:
    exact: dict[str, Scalar] = {"wire__recover__keep": 1.0, "wire__topk__keep": 1.0, "local__batch_size": 6}
    bounds: dict[str, Scalar] = {
        "control__staleness__high": 0.0, "control__importance__low": 0.0, "control__importance__high": 0.0,
        "control__batch_size__low": 6,
    }  # fmt: skip
    without = caesar(control__tune="", out=str(tmp_path / "without"), rounds=2, **exact)
    neutral = caesar(out=str(tmp_path / "neutral"), rounds=2, local__batch_size=3, **bounds)
    found = [digest_of_weights(experiment.run(config, Loop(config))) for config in (without, neutral)]
    assert found[0] == found[1]


def digest_of_weights(folder: Path) -> tuple[str, str]:
    summary: Mapping[str, str] = json.loads((folder / "summary.json").read_text())
    return summary["weights_sha256"], summary["ledger_sha256"]


def test_a_split_counts_activations_in_the_time_model() -> None:
    """What the time model says that a sample sends is what the wire carries, and the plan knows the choices."""
    for shape, streams in (("u-shape", 2), ("vanilla", 1)):
        split = caesar(cut__shape=shape, cut__front=1, rounds=1, wire__activations_up="half", train="all")
        planned = account(split)
        assert planned.estimated == ()
        load = load_of(world(split), "", 0, False)
        assert load.messages == 2 * streams
        ways = {"up": load.sample_up_bytes, "down": load.sample_down_bytes}
        for way, each in ways.items():
            crossed = planned.bytes[f"activations-{way}"] + planned.bytes[f"gradients-{way}"]
            assert each == pytest.approx(crossed / planned.visits, rel=0.05), (shape, way)  # small batches: more heads
    assert load_of(world(caesar()), "", 0, False).messages == 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"wire.parameters-down": ""}, "no 'recover' is named"),
        ({"control.tune": "importance,bandwidth"}, "both set wire.topk.keep"),
        ({"local.max-steps": 0}, "set local.max-steps"),
        ({"devices.fleet": "", "devices.jitter": 0.0}, "all are infinitely fast"),
        ({"control.staleness.high": 1.0}, "wire.recover.keep must be more than 0"),
    ],
)
def test_what_is_refused_at_the_start(changes: dict[str, Scalar], sentence: str) -> None:
    config = resolve({**CAESAR, **changes})
    with pytest.raises(FedsplitError, match=sentence):
        check(config, world(config))


def test_a_key_that_all_clients_must_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Staleness, "keys", ("optimizer.lr",))
    with pytest.raises(FedsplitError, match="sets optimizer.lr, which must not differ from client to client"):
        check(caesar(control__tune="staleness"), world(caesar(control__tune="staleness")))


def test_no_accuracy_is_asked_for_by_who_does_not_learn_from_it() -> None:
    config = caesar()
    check(config, world(config))
    assert not steer.learns(config) and not config.data.local_test
    off: dict[str, Scalar] = {"body__layerdrop__rate": 0.0, "control__bandit__rates": "0"}
    learner = caesar(
        control__tune="staleness,bandit", body__plans="layerdrop", cut__shape="u-shape", cut__front=0, **off
    )
    assert steer.learns(learner)
    with pytest.raises(FedsplitError, match="control.tune=bandit learns from accuracy"):
        check(learner, world(learner))


def test_worlds_of_choices_are_made_once_and_not_kept_for_ever() -> None:
    built = world(caesar())
    assert steered(built, "") is built
    one = steered(built, steer.dump({BATCH: 3}))
    assert one is steered(built, steer.dump({BATCH: 3})) and one.config.local.batch_size == 3
    assert one.shards is built.shards and built.config.local.batch_size != 3
    for number in range(300):
        steered(built, steer.dump({BATCH: 1 + number}))
    assert len(built.memo["steered"]) <= 256
