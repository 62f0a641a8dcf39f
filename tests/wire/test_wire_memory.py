"""What codecs remember, from message to message and from round to round."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit import experiment
from fedsplit.config import resolve
from fedsplit.plan import account
from fedsplit.progress import Silent
from fedsplit.runtime.inprocess import Loop, Pool
from fedsplit.types import STREAMS, Scalar, Stream
from fedsplit.wire import CODECS
from fedsplit.wire.delta import REFERENCE
from fedsplit.wire.feedback import RESIDUAL
from fedsplit.wire.frame import pack, unpack
from fedsplit.wire.link import Link

UP: Stream = "parameters-up"
DOWN: Stream = "parameters-down"


def ends(stream: Stream, *codecs: Any) -> tuple[Link, Link]:
    return Link({stream: codecs}), Link({stream: codecs})


def test_the_residual_is_what_the_receiver_has_not_got() -> None:
    one, other = ends(UP, CODECS["feedback"](), CODECS["topk"](keep=0.1), CODECS["int8"]())
    put_in, got = torch.zeros(20, 20), torch.zeros(20, 20)
    residual = torch.zeros(20, 20)
    for _ in range(20):
        x = torch.randn(20, 20)
        received = other.decode(UP, one.encode(UP, {"w": x}))["w"]
        assert torch.equal(one.memory[UP, "w", 0][RESIDUAL], x + residual - received)
        residual = one.memory[UP, "w", 0][RESIDUAL]
        put_in, got = put_in + x, got + received
    assert torch.allclose(put_in, got + residual, atol=1e-4)
    assert residual.norm() > 1


@pytest.mark.parametrize("behind", [(), ("topk",), ("sign",), ("int8", "zstd")], ids=",".join)
def test_both_ends_keep_the_same_reference(behind: tuple[str, ...]) -> None:
    one, other = ends(DOWN, CODECS["delta"](), *(CODECS[name]() for name in behind))
    w = torch.randn(30, 30)
    assert torch.equal(other.decode(DOWN, one.encode(DOWN, {"w": w}))["w"], w), "the first time whole"
    for _ in range(5):
        w = w + 0.1 * torch.randn(30, 30)
        got = other.decode(DOWN, one.encode(DOWN, {"w": w}))["w"]
        held = [end.memory[DOWN, "w", 0][REFERENCE] for end in (one, other)]
        assert torch.equal(*held) and torch.equal(held[0], got)
        if not behind:
            assert torch.allclose(got, w, rtol=0, atol=1e-6), "alone it is right to the last bits"


def test_what_a_lossy_stage_loses_comes_with_later_differences() -> None:
    one, other = ends(DOWN, CODECS["delta"](), CODECS["topk"](keep=0.3))
    one.encode(DOWN, {"w": torch.zeros(100)})
    other.memory.update(one.memory)
    w = torch.randn(100)
    errors = [float((other.decode(DOWN, one.encode(DOWN, {"w": w}))["w"] - w).norm()) for _ in range(4)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1 and errors[3] == pytest.approx(0, abs=1e-6)


def test_an_upload_is_the_change_of_the_round() -> None:
    """Top-k acts on the change; the server adds it to its own model, not to the one that the client got."""
    one, other = ends(UP, CODECS["delta"](), CODECS["topk"](keep=0.5))
    got, exact = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.5, 2.5, 3.5, 4.5])
    one.hold(UP, {"w": got})
    other.hold(UP, {"w": exact})
    trained = got + torch.tensor([0.25, -2.0, 0.5, 0.125])
    received = other.decode(UP, one.encode(UP, {"w": trained}))["w"]
    assert torch.equal(received, exact + torch.tensor([0.0, -2.0, 0.5, 0.0]))
    assert not one.kept() and not other.kept(), "nothing is left for the next round"


# Relative L2 error by drift: the paper's rule, the clamp, top-k of the difference, the stale model.
TABLE = {
    0.01: (0.0313, 0.0235, 0.0036, 0.0100),
    0.10: (0.1093, 0.0931, 0.0359, 0.1002),
    0.12: (0.1215, 0.1053, 0.0431, 0.1201),
    0.25: (0.1779, 0.1692, 0.0899, 0.2505),
    1.00: (0.2102, 0.2694, 0.3586, 1.0001),
}


@pytest.mark.parametrize("drift", TABLE)
def test_recovery_is_as_far_off_as_the_card_measured(drift: float) -> None:
    w = torch.randn(500, 1000)
    stale = w + drift * torch.randn(500, 1000)
    found = []
    for rule in ("paper", "clamp"):
        one, other = ends(DOWN, CODECS["recover"](keep=0.4, rule=rule))
        other.decode(DOWN, one.encode(DOWN, {"w": stale}))
        other.hold(DOWN, {"w": stale})
        found.append(other.decode(DOWN, one.encode(DOWN, {"w": w}))["w"])
    one, other = ends(DOWN, CODECS["delta"](), CODECS["topk"](keep=0.4))
    other.decode(DOWN, one.encode(DOWN, {"w": stale}))
    found += [other.decode(DOWN, one.encode(DOWN, {"w": w}))["w"], stale]
    errors = [float((x - w).norm() / w.norm()) for x in found]
    assert errors == pytest.approx(TABLE[drift], rel=0.03, abs=1e-4)


def test_the_rules_of_recovery_by_hand() -> None:
    w = torch.tensor([[9.0, -1.0, 2.0, -3.0, 0.0]])
    stale = torch.tensor(
        [[5.0, -2.0, -1.0, -4.0, 0.5]]
    )  # kept; sign right; sign wrong; right but beyond m = 3; 0 is plus
    mean = (1 + 2 + 3 + 0) / 4
    expected = {
        "paper": [9.0, -2.0, mean, -mean, 0.5],
        "clamp": [9.0, -2.0, mean, -3.0, 0.5],
        "none": [9.0, -mean, mean, -mean, mean],
    }
    for rule, values in expected.items():
        one, other = ends(DOWN, CODECS["recover"](keep=0.2, rule=rule))
        one.memory[DOWN, "w", 0] = {"met": torch.empty(0)}
        other.hold(DOWN, {"w": torch.cat([stale, stale])})
        got = other.decode(DOWN, one.encode(DOWN, {"w": torch.cat([w, w])}))["w"]
        assert got.tolist() == [values, values], rule


@pytest.mark.parametrize("kind", ["trained", "received"])
def test_the_stale_copy_is_the_one_that_was_asked_for(kind: str) -> None:
    one, other = ends(DOWN, CODECS["recover"](keep=0.5, stale=kind))
    sent, trained = torch.randn(6, 6), torch.randn(6, 6)
    other.decode(DOWN, one.encode(DOWN, {"w": sent}))
    other.hold(DOWN, {"w": trained})
    assert torch.equal(other.memory[DOWN, "w", 0]["stale"], trained if kind == "trained" else sent)


def test_memory_is_written_down_and_read_again() -> None:
    codecs = {UP: [CODECS["feedback"](), CODECS["topk"]()], DOWN: [CODECS["delta"](), CODECS["sign"]()]}
    whole, first = Link(codecs), Link(codecs)
    messages = [{"w": torch.randn(9, 9), "b.c": torch.randn(9)} for _ in range(4)]
    expected = [whole.encode(stream, x) for x in messages for stream in (UP, DOWN)]
    got = [first.encode(stream, x) for x in messages[:2] for stream in (UP, DOWN)]
    second = Link(codecs, messages=first.messages)
    second.recall({"own|w": torch.zeros(1), **unpack(pack(first.kept()))})
    got += [second.encode(stream, x) for x in messages[2:] for stream in (UP, DOWN)]
    assert got == expected and {name.split("|")[0] for name in first.kept()} == {"wire"}


STACK: dict[str, Scalar] = {
    "model.name": "fedsplit_nano", "model.pretrained": False, "cut.front": 1, "cut.tail": 1,
    "data.limit": 96, "data.test-limit": 20, "data.partition": "iid", "devices.count": 4, "devices.per-round": 3,
    "rounds": 4, "local.batch-size": 8, "local.max-steps": 2, "share.quorum": 0.3, "engine.faults": "raise:2@1",
    "wire.activations-up": "token-topk,int8", "wire.int8.rounding": "stochastic", "wire.activations-down": "half",
    "wire.gradients-up": "qsgd", "wire.gradients-down": "topk,bfloat16",
    "wire.parameters-up": "delta,feedback,topk,int8", "wire.parameters-down": "recover", "wire.topk.keep": 0.3,
}  # fmt: skip


def digest(folder: Path) -> tuple[str, str, str]:
    summary = json.loads((folder / "summary.json").read_text())
    rows = (folder / "clients.csv").read_text().splitlines()
    errors = [[row[name] for name in ("client", "recover_error", "stale_error")] for row in csv.DictReader(rows)]
    return summary["weights_sha256"], summary["ledger_sha256"], json.dumps(errors)


class Stop(Silent):
    def row(self, row: Mapping[str, Any]) -> None:
        if row["round"] == 3:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = resolve({**STACK, "out": str(tmp_path_factory.mktemp("stack") / "run")})
    return experiment.run(config, Loop(config))


def test_a_client_that_failed_is_sent_the_exact_model_again(whole: Path) -> None:
    rows = list(csv.DictReader((whole / "clients.csv").read_text().splitlines()))
    assert [(row["round"], row["client"]) for row in rows if row["failure"]] == [("1", "2")]
    seen: set[str] = set()
    sizes: dict[bool, set[str]] = {False: set(), True: set()}
    for row in rows:
        if not row["failure"]:
            met = row["client"] in seen
            assert bool(row["recover_error"]) == bool(row["stale_error"]) == met, row
            sizes[met].add(row["bytes_parameters_down"])
            seen.add(row["client"])
    assert len(seen) == 4 and len(sizes[True]) == len(sizes[False]) == 1
    assert int(*sizes[True]) < 0.8 * int(*sizes[False])


def test_bytes_with_codecs_and_without(whole: Path) -> None:
    rows = list(csv.DictReader((whole / "ledger.csv").read_text().splitlines()))
    for stream in STREAMS:
        name = stream.replace("-", "_")
        assert 0 < int(rows[-1][name]) < int(rows[-1][f"raw_{name}"])
    summary = json.loads((whole / "summary.json").read_text())
    raw = sum(int(row[name]) for row in rows for name in row if name.startswith("raw_"))
    assert summary["bytes_raw"] == raw > 2 * (summary["bytes_up"] + summary["bytes_down"])


@pytest.mark.slow
def test_a_run_with_the_whole_stack_is_the_same_resumed_and_in_a_pool(whole: Path, tmp_path: Path) -> None:
    config = resolve({**STACK, "out": str(tmp_path / "run")})
    with pytest.raises(KeyboardInterrupt):
        experiment.run(config, Loop(config), progress=Stop())
    resumed = resolve({"resume": str(tmp_path / "run"), "rounds": 1})
    assert digest(experiment.run(resumed, Loop(config))) == digest(whole)
    config = resolve({**STACK, "engine.workers": 2, "out": str(tmp_path / "pool")})
    runner = Pool(config)
    try:
        assert digest(experiment.run(config, runner)) == digest(whole)
    finally:
        runner.close()


def test_the_plan_leaves_out_what_zstd_saves_and_says_so(tmp_path: Path) -> None:
    values: dict[str, Scalar] = {**STACK, "engine.faults": "", "rounds": 1, "wire.gradients-up": "qsgd,zstd"}
    planned = account(resolve(values))
    assert planned.estimated == ("bytes of gradients-up: left out is what zstd saves, since values decide it",)
    config = resolve({**values, "out": str(tmp_path / "run")})
    row = next(csv.DictReader((experiment.run(config, Loop(config)) / "ledger.csv").read_text().splitlines()))
    assert 0.5 * planned.bytes["gradients-up"] < int(row["gradients_up"]) < planned.bytes["gradients-up"]
    for stream in STREAMS:
        assert planned.raw_bytes[stream] == int(row[f"raw_{stream.replace('-', '_')}"])
        assert stream == "gradients-up" or planned.bytes[stream] == int(row[stream.replace("-", "_")])
