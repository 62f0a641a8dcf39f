"""The cost account against real runs, byte for byte and FLOP for FLOP, and against the textbook."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fedsplit import experiment
from fedsplit.cli.main import main
from fedsplit.config import Config, load
from fedsplit.data import sources
from fedsplit.hollow import frame_bytes
from fedsplit.plan import SUMS, account
from fedsplit.readings import full_fine_tuning, readings
from fedsplit.runtime.inprocess import Loop
from fedsplit.settings import Data
from fedsplit.types import STREAMS, FedsplitError
from fedsplit.wire.frame import pack
from fedsplit.wire.half import Half
from fedsplit.wire.link import Link
from fedsplit.world import ghost

TINY = (
    "data.limit=32", "data.test-limit=40", "data.partition=iid", "data.allow-missing-classes=true",
    "model.name=fedsplit_nano", "model.pretrained=false", "devices.count=3", "local.batch-size=4", "rounds=2",
    "eval.every=9",
)  # fmt: skip
MICRO = ("model.name=fedsplit_micro",)  # where three blocks are too few
PAPER, DEMO = "papers/sfprompt", "demo"
TWICE = "local.self-update.epochs=2"
PTLS = (*MICRO, "share.partial=ptls", "rounds=3", "devices.per-round=2")
PEAK = 0.1
VIT = ("model.name=vit_tiny_patch16_224", "model.image-size=64")
PENALTIES = "front.penalties=nopeek,lipschitz,adversary"
RANDOM = ("body.knapsack.backward=random", "body.knapsack.forward=random", "body.knapsack.budget=0.5")
CODECS = (
    "wire.activations-up=token-topk,int8", "wire.activations-down=qsgd", "wire.gradients-up=topk",
    "wire.gradients-down=sign", "local.max-steps=1", "devices.per-round=2",
)  # fmt: skip
SPLIT = ("demo", "baselines/splitfed_v1", "baselines/splitfed_v2", "baselines/sequential")
WHOLE = tuple(f"baselines/{name}" for name in ("centralised", "fedavg", "fedpeft_lora", "fedprox", "linear_probe"))
CASES: list[tuple[str, tuple[str, ...]]] = [
    *((name, ()) for name in (*SPLIT, *WHOLE)),
    ("baselines/splitfed_v2", ("server.optimizer=step",)),
    (PAPER, (TWICE,)),
    (PAPER, (TWICE, *(f"wire.{stream}=half" for stream in STREAMS))),
    (PAPER, (TWICE, "cut.pool=tail", "local.head=auto", *VIT)),
    (PAPER, (TWICE, *VIT)),
    (PAPER, (TWICE, "front.cache=false", "data.local-test=0.2", "eval.per-client=true")),
    (PAPER, (TWICE, "data.el2n.once=true", "data.el2n.epochs=2", "rounds=3", "devices.per-round=2")),
    (PAPER, (TWICE, "cut.front=1", "cut.tail=1", "cut.pool=tail")),
    (PAPER, ("local.phases=", "data.select=random", "rounds=3", "devices.per-round=2")),
    (PAPER, ("local.phases=", "data.select=random", "data.random.once=true", "local.max-steps=2", "rounds=3")),
    (PAPER, ("local.phases=", "data.select=random", "front.cache-memory-bytes=70000", "front.cache-disk-bytes=0")),
    (PAPER, (TWICE, "front.prompts.deep=true", "data.partition=dirichlet", "data.min-samples=3")),
    (PAPER, (TWICE, "cut.front=2", "front.prompts.at=cut", "front.prompts.side=server")),
    (PAPER, ("local.self-update.epochs=0", "local.epochs=2")),
    (PAPER, (TWICE, "cut.front=1", "front.edits=prompts,bottleneck,quantize", "front.bottleneck.rank=8")),
    (DEMO, ("cut.front=1", "front.edits=bottleneck,noise,prompts", "body.plans=layerdrop", PENALTIES)),
    (DEMO, ("body.edits=lora", "train=lora,head", "data.partition=dirichlet")),
    (DEMO, (*VIT, "model.dropout=0.1", "model.drop-path=0.2", "optimizer.name=sgd", "local.epochs=1")),
    (DEMO, ("local.epochs=0",)),
    (DEMO, ("cut.front=1", "body.plans=layerdrop", "body.layerdrop.rescale=inverse")),
    (DEMO, (*MICRO, "body.plans=knapsack,layerdrop", *RANDOM, "cut.shape=vanilla", "body.layerdrop.rate=0.3")),
    ("baselines/fedpeft_lora", (*MICRO, "body.plans=layerdrop", "body.scope=all", "data.partition=dirichlet")),
    (PAPER, (TWICE, "body.plans=knapsack", *RANDOM)),
    (DEMO, (*PTLS, "cut.tail=1", "share.ptls.head=personal", "local.max-steps=1")),
    (DEMO, (*PTLS, "share.ptls.by=gradient", "cut.front=3", "wire.parameters-up=half", "local.max-steps=1")),
    ("baselines/fedavg", (*PTLS, "share.ptls.by=gradient", "local.max-steps=1")),
    (DEMO, (*PTLS, *CODECS, "wire.parameters-up=delta,feedback,topk,int8", "wire.parameters-down=recover,bfloat16")),
    ("baselines/splitfed_v2", (*CODECS, "wire.parameters-up=recover", "wire.parameters-down=delta,sign", "rounds=3")),
]  # fmt: skip


def config_of(repository: Path, name: str, *pairs: str) -> Config:
    """A config of `configs/` with little data; a centralised one keeps its single device."""
    tiny = [pair for pair in TINY if not (name.endswith("centralised") and pair.startswith("devices."))]
    return load([repository / "configs" / f"{name}.toml"], [*tiny, *pairs])


def run(config: Config, out: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """The sums of a real run, named as those of a plan, and its summary."""
    path = experiment.run(config.replace(out=str(out)), Loop(config))
    sums: dict[str, int] = {}
    for table, prefix in (("ledger", "bytes_"), ("clients", "")):
        with (path / f"{table}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                for key in row:
                    if f"{prefix}{key}" in (*SUMS, "client_flops", "server_flops") or (prefix and key != "round"):
                        sums[f"{prefix}{key}"] = sums.get(f"{prefix}{key}", 0) + int(row[key])
    return sums, json.loads((path / "summary.json").read_text())


@pytest.mark.parametrize("name, pairs", CASES, ids=lambda value: value if isinstance(value, str) else ",".join(value))
def test_a_run_agrees_with_its_plan(name: str, pairs: tuple[str, ...], repository: Path, tmp_path: Path) -> None:
    config = config_of(repository, name, *pairs)
    planned = account(config)
    sums, summary = run(config, tmp_path / "run")
    figures = planned.figures()
    assert figures["estimated"] == []
    assert {key: figures["total"][key] for key in sums} == sums and len(sums) == 2 * len(STREAMS) + len(SUMS) + 1
    for side in ("client", "server"):
        assert figures[f"{side}_peak_bytes"] == pytest.approx(summary[f"{side}_peak_bytes"], rel=PEAK)
    assert figures["client_stored_bytes"] == summary["client_stored_bytes"]
    trained = planned.parameters["client"] + planned.parameters["server"]
    assert trained == summary["trainable_params"]


def test_what_depends_on_scores_is_estimated(repository: Path, tmp_path: Path) -> None:
    little = ("front.cache-memory-bytes=70000", "front.cache-disk-bytes=0", TWICE)
    config = config_of(repository, PAPER, *little)
    planned = account(config)
    sums, _ = run(config, tmp_path / "run")
    figures = planned.figures()
    assert [reason.partition(":")[0] for reason in planned.estimated] == ["client FLOPs"]
    exact = {key for key in sums if key not in ("client_flops", "computed_samples")}
    assert {key: figures["total"][key] for key in exact} == {key: sums[key] for key in exact}
    assert figures["total"]["client_flops"] == pytest.approx(sums["client_flops"], rel=0.05)
    config = config_of(repository, DEMO, "cut.front=1", "body.plans=knapsack", "local.epochs=3")
    planned = account(config)
    sums, _ = run(config, tmp_path / "plans")
    assert [reason.partition(":")[0] for reason in planned.estimated] == ["server FLOPs, peak and plans"]
    assert planned.server_flops == pytest.approx(sums["server_flops"], rel=0.05)
    assert planned.client_flops == sums["client_flops"]
    sent = sum(count for name, count in sums.items() if name in {f"bytes_{s.replace('-', '_')}" for s in STREAMS})
    assert planned.total_bytes == pytest.approx(sent, rel=1e-3)
    fleet = ("data.local-test=0.2", "devices.flops-per-s=1e9", "devices.server-flops-per-s=1e9")
    steered = account(config_of(repository, "papers/droppeft", "control.tune=bandit", "local.batch-size=4", *fleet))
    assert [reason.partition(":")[0] for reason in steered.estimated] == ["server FLOPs, peak and plans"]
    assert 0 < steered.client_flops < account(full_fine_tuning(steered.config)).client_flops
    both = account(config_of(repository, PAPER, "data.select=el2n,random", TWICE))
    assert [reason.partition(":")[0] for reason in both.estimated] == ["kept samples"]


def test_layers_that_clients_keep_cross_the_wire_once(repository: Path) -> None:
    pairs = ("train=all", "cut.tail=1", "rounds=3")
    own, plain = (account(config_of(repository, DEMO, *MICRO, *more, *pairs)) for more in (PTLS[1:2], ()))
    up, down = (own.bytes[name] / plain.bytes[name] for name in ("parameters-up", "parameters-down"))
    assert 0.6 < up < 0.7 and down == pytest.approx((1 + 2 * up) / 3), "2 of the client's 3 blocks, and what is in none"
    others = {name: count for name, count in own.bytes.items() if not name.startswith("parameters")}
    assert others == {name: count for name, count in plain.bytes.items() if name in others}


def test_which_blocks_gradients_choose_is_estimated(repository: Path) -> None:
    twelve = ("cut.shape=none", "cut.front=0", "model.name=vit_tiny_patch16_224", "model.image-size=32", "train=all")
    planned = account(config_of(repository, DEMO, *PTLS, "share.ptls.by=gradient", *twelve))
    assert [reason.partition(":")[0] for reason in planned.estimated] == ["bytes of parameters"]
    assert account(config_of(repository, DEMO, *PTLS, *twelve)).estimated == ()


def test_the_virtual_clock(repository: Path, tmp_path: Path) -> None:
    fleet = (
        "devices.flops-per-s=1e9",
        "devices.up-bytes-per-s=1e6",
        "devices.latency-s=0.1",
        "devices.active-w=3",
        "local.max-steps=2",
    )
    for schedule in ("splitfed-v1", "splitfed-v2"):
        config = config_of(repository, DEMO, *fleet, f"server.schedule={schedule}", "data.partition=dirichlet")
        planned = account(config)
        _, summary = run(config, tmp_path / schedule)
        assert planned.virtual_s == pytest.approx(summary["virtual_s"])
        assert planned.energy_j == pytest.approx(summary["energy_j"])


def test_frames_are_measured_without_their_bytes() -> None:
    tensors = {
        "b.weight": torch.zeros(3, 5), "a.é": torch.zeros(7, dtype=torch.float16), "step": torch.zeros(()),
        "n": torch.zeros(2, 0), "labels": torch.zeros(9, dtype=torch.int64), "mask": torch.zeros(3, dtype=torch.bool),
    }  # fmt: skip
    hollow = {name: x.to("meta") for name, x in tensors.items()}
    for count in range(len(tensors) + 1):
        names = list(tensors)[:count]
        length = len(pack({name: tensors[name] for name in names}))
        assert frame_bytes({}, "parameters-up", {name: hollow[name] for name in names}) == length
    codecs = {"parameters-up": [Half()]}
    for each in (tensors, hollow):
        del each["a.é"]  # codecs take float32
    assert frame_bytes(codecs, "parameters-up", hollow) == len(Link(codecs).encode("parameters-up", tensors))


def test_large_models_are_planned_without_weights(repository: Path) -> None:
    begun = time.perf_counter()
    sizes = {}
    for name in ("vit_base_patch16_224", "vit_large_patch16_224"):
        config = config_of(repository, PAPER, f"model.name={name}", "model.pretrained=true", "data.limit=0")
        sizes[name] = account(config).parameters["total"]
    assert sizes["vit_base_patch16_224"] == pytest.approx(86e6, rel=0.01)
    assert sizes["vit_large_patch16_224"] == pytest.approx(304e6, rel=0.01)
    assert time.perf_counter() - begun < 60, "minutes would mean that weights or pictures were made"


def test_a_forward_pass_of_vit_base_is_that_of_the_textbook(repository: Path) -> None:
    whole = config_of(repository, "baselines/linear_probe", "model.name=vit_base_patch16_224")
    flops = ghost(whole).flops  # only the classifier trains, so its own gradient is all that is not forward
    assert flops.total == pytest.approx(2 * 17.5e9, rel=0.01)


def test_hollow_worlds_hold_no_values(repository: Path) -> None:
    world = ghost(config_of(repository, PAPER, "model.checkpoint=/nowhere.safetensors"))
    assert {p.device.type for p in world.backbone.vit.parameters()} == {"meta"} and not world.initial
    for size in (8, 224):
        hollow, real = (sources.load(Data(limit=50), size, blank) for blank in (True, False))
        assert hollow.train.pixels.shape == real.train.pixels.shape and hollow.train.pixels.strides == (0, 0, 0, 0)
        assert np.array_equal(hollow.train.labels, real.train.labels) and hollow.classes == real.classes


def test_hollow_folders_have_the_labels_and_decode_nothing(tmp_path: Path) -> None:
    labels, cells = [2, 0, 1, 1, 2], [{"bytes": b"no picture"}] * 5
    for name in ("train", "test"):
        pq.write_table(pa.table({"image": cells, "label": labels}), tmp_path / f"{name}.parquet")
    settings = Data(source=str(tmp_path), cache=str(tmp_path / "cache"), limit=4)
    found = sources.load(settings, 224, hollow=True)
    assert found.train.labels.tolist() == labels[:4] and found.test.pixels.shape == (5, 224, 224, 3)
    with pytest.raises(FedsplitError, match="cannot decode"):
        sources.load(settings, 224)


def test_the_baseline_is_the_same_run(repository: Path) -> None:
    config = config_of(repository, PAPER, "wire.activations-up=half", "local.head=auxiliary", "cut.pool=body")
    own, base = account(config), account(full_fine_tuning(config))
    plain = account(config_of(repository, "baselines/fedavg"))
    assert base.client_flops == plain.client_flops and base.bytes == plain.bytes and base.server_flops == 0
    assert base.client_rounds == own.client_rounds and base.samples == own.samples
    assert readings(plain, base)[0].bytes_ratio == 1.0 == readings(plain, base)[0].client_flops_ratio


def test_readings_are_the_configs_they_name(repository: Path) -> None:
    config = config_of(repository, PAPER, TWICE, "cut.pool=tail")
    own, base = account(config), account(full_fine_tuning(config))
    found = {reading.name: reading for reading in readings(own, base)}
    assert list(found) == [
        "as run", "nothing kept", "as many passes", "split steps alone", "four full tensors", "pooled at the body"
    ]  # fmt: skip
    bare = account(config.replace(front__cache=False))
    assert found["nothing kept"].client_flops_ratio == bare.client_flops / base.client_flops
    assert found["as many passes"].client_flops_ratio == pytest.approx(bare.client_flops / base.client_flops / 3)
    pooled = account(config.replace(cut__pool="body"))
    assert found["pooled at the body"].bytes_ratio == pooled.total_bytes / base.total_bytes
    last = readings(pooled, base)[-1]
    assert (last.name, last.bytes_ratio) == ("pooled at the tail", own.total_bytes / base.total_bytes)
    assert (
        found["four full tensors"].bytes_ratio > found["as run"].bytes_ratio > found["pooled at the body"].bytes_ratio
    )


def test_json(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--config", str(repository / "configs/papers/sfprompt.toml"), "--json"]
    command += [word for pair in TINY for word in ("--set", pair)]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    sides = {
        "name",
        "model",
        "devices",
        "rounds",
        "per_client_round",
        "total",
        "client_peak_bytes",
        "server_peak_bytes",
    }
    assert sides | {"parameters", "estimated"} <= set(found) and sides <= set(found["baseline"])
    assert {"client_flops_ratio", "bytes_ratio", "readings"} <= set(found)
    means = {"client_flops", "server_flops", "bytes_up", "bytes_down"}
    assert means | {f"bytes_{name.replace('-', '_')}" for name in STREAMS} <= set(found["per_client_round"])
    assert found["baseline"]["name"] == "fedavg" and found["readings"][0]["bytes_ratio"] == found["bytes_ratio"]
    assert main([*command, "--against", str(repository / "configs/baselines/splitfed_v1.toml")]) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["baseline"]["name"] == "splitfed-v1" and other["baseline"]["devices"] == 3
    assert other["total"] == found["total"] and other["bytes_ratio"] != found["bytes_ratio"]


@pytest.mark.parametrize("name", ["smoke", *SPLIT, *WHOLE, PAPER])
def test_tables(name: str, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for pair in ("rounds=1", *TINY[:6]) for word in ("--set", pair)]
    assert main(["plan", "--config", str(repository / "configs" / f"{name}.toml"), *words]) == 0
    out = capsys.readouterr().out
    assert "Against FedAvg full fine-tuning of the same run" in out and "client compute (GFLOPs)" in out
    assert ("counted in other ways" in out) == (name not in WHOLE)


@pytest.mark.parametrize(
    "pair, words",
    [
        ("nonsense=1", "Unknown config key 'nonsense'"),
        ("cut.front=99", "do not fit a model of 8 blocks"),
        ("cut.front=8", "leave the server none of 8 blocks"),
        ("train=lora", "names no parameter of this model"),
        ("devices.per-round=11", "more than the 10 devices"),
        ("devices.count=100000", "samples each need more than"),
        ("model.name=vit_nonsense", "nor known to timm"),
        ("resume=somewhere", "nothing to plan"),
    ],
)
def test_refusals(pair: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--json", "--set", pair]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and words in captured.err


def test_an_existing_run_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    words = [word for pair in (f"out={tmp_path}", *TINY) for word in ("--set", pair)]
    assert main(["plan", "--json", *words]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    with pytest.raises(FedsplitError, match="Cannot read"):
        load([tmp_path / "none.toml"])
