"""What a run leaves behind: its files, its figures, and that they follow from one another."""

from __future__ import annotations

import csv
import json
import math
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedsplit import experiment, runs
from fedsplit.config import Config, load, read_toml, resolve
from fedsplit.runtime.inprocess import Loop
from fedsplit.types import STREAMS, Scalar
from fedsplit.world import world

SIZES = (10, 30, 20)
BATCH = 8
STEPS = 3
WIDTH, DEPTH, TOKENS, CLASSES = 96, 8, 16, 10  # the shipped model at 16 pixels, patches of 4
TINY: dict[str, Scalar] = {
    "data.limit": 60,
    "data.test-limit": 40,
    "data.partition": "size",
    "data.sizes": ",".join(map(str, SIZES)),
    "devices.count": 3,
    "model.image-size": 16,
    "rounds": 2,
    "local.batch-size": BATCH,
    "local.max-steps": STEPS,
    "cut.front": 2,
    "cut.tail": 1,
}
SUMMARY = [
    "accuracy",
    "loss",
    "rounds",
    "seed",
    "bytes_up",
    "bytes_down",
    "bytes_activations",
    "bytes_gradients",
    "bytes_parameters",
    "client_flops",
    "server_flops",
    "client_peak_bytes",
    "server_peak_bytes",
    "virtual_s",
    "wall_s",
    "energy_j",
    "trainable_params",
    "kept_samples",
    "weights_sha256",
    "failures",
]
SUMS = [
    "bytes_up",
    "bytes_down",
    "bytes_activations",
    "bytes_gradients",
    "bytes_parameters",
    "client_flops",
    "server_flops",
    "virtual_s",
    "wall_s",
    "energy_j",
    "kept_samples",
    "failures",
]


def tiny(**changes: Scalar) -> Config:
    """Three devices of 10, 30 and 20 samples, two rounds of at most three steps, U-shape 2/5/1."""
    return resolve(TINY).replace(**changes)


def run(config: Config, folder: Path) -> Path:
    return experiment.run(config.replace(out=str(folder)), Loop(config))


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def summary(folder: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return figures


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The U-shaped run."""
    return run(tiny(), tmp_path_factory.mktemp("done") / "run")


def test_files(done: Path) -> None:
    names = {file.name for file in done.iterdir()}
    tables = {"rounds.csv", "clients.csv", "ledger.csv", "classes.csv", "partition.csv", "proof.csv"}
    pictures = {"partition.png", "accuracy.png"}
    assert names == tables | pictures | {"config.toml", "summary.json", "model.safetensors", "checkpoint"}
    assert all((done / name).stat().st_size > 5000 for name in pictures)
    assert sorted(file.name for file in (done / "checkpoint").iterdir()) == ["round-000001", "round-000002"]
    modes = {stat.S_IMODE(file.stat().st_mode) for file in done.iterdir() if file.is_file()}
    assert len(modes) == 1, "whoever may read one file may read all"


def test_columns(done: Path) -> None:
    streams = [name.replace("-", "_") for name in STREAMS]
    assert list(table(done, "ledger")[0]) == ["round", *streams, *(f"raw_{name}" for name in streams)]
    rounds = set(table(done, "rounds")[0])
    assert rounds >= {"round", "accuracy", "loss", "personal_accuracy", "train_loss", "clients", "learning_rate", *SUMS}
    clients = set(table(done, "clients")[0])
    assert clients >= {"round", "client", "samples", "steps", "failure", *(f"bytes_{name}" for name in streams)}
    assert list(table(done, "classes")[0]) == ["round", "class", "samples", "accuracy"]
    assert [row["round"] for row in table(done, "rounds")] == ["1", "2"]
    assert [(row["round"], row["client"]) for row in table(done, "clients")] == [
        (number, client) for number in "12" for client in "012"
    ]
    assert len(table(done, "classes")) == 2 * CLASSES
    for row in table(done, "rounds"):
        empty = {"personal_accuracy", "local_loss", "local_accuracy", "workload_variance", "gradient_cosine"}
        empty |= {"recover_error", "stale_error"}
        assert all(value != "" for name, value in row.items() if name not in empty)


def test_config_says_what_ran_and_where(done: Path) -> None:
    text = (done / "config.toml").read_text()
    head = [line for line in text.splitlines() if line.startswith("#")]
    for word in ("fedsplit: ", "torch: ", "commit: ", "seed: 0", "threads: 1"):
        assert any(word in line for line in head), word
    assert read_toml(done / "config.toml") == {**tiny().values, "out": str(done)}


def test_summary(done: Path) -> None:
    figures = summary(done)
    assert set(SUMMARY) <= set(figures)
    rounds, clients, ledger = (table(done, name) for name in ("rounds", "clients", "ledger"))
    assert figures["rounds"] == 2 and figures["seed"] == 0
    assert (figures["accuracy"], figures["loss"]) == (float(rounds[-1]["accuracy"]), float(rounds[-1]["loss"]))
    for name in SUMS:
        assert figures[name] == pytest.approx(sum(float(row[name]) for row in rounds), rel=1e-12), name
    for name in ("kept_samples", "client_flops", "server_flops"):
        assert figures[name] == sum(int(row[name]) for row in clients), name
    for side in ("client", "server"):
        assert figures[f"{side}_peak_bytes"] == max(int(row[f"{side}_peak_bytes"]) for row in clients) > 0
    streams = [name.replace("-", "_") for name in STREAMS]
    for row in ledger:
        for name in streams:
            each = [int(client[f"bytes_{name}"]) for client in clients if client["round"] == row["round"]]
            assert int(row[name]) == sum(each) > 0
    for way in ("up", "down"):
        assert figures[f"bytes_{way}"] == sum(
            int(row[name]) for row in ledger for name in streams if name.endswith(way)
        )
    for kind in ("activations", "gradients", "parameters"):
        total = sum(int(row[name]) for row in ledger for name in streams if name.startswith(kind))
        assert figures[f"bytes_{kind}"] == total
    both = figures["bytes_up"] + figures["bytes_down"]
    assert figures["bytes_activations"] + figures["bytes_gradients"] + figures["bytes_parameters"] == both
    assert figures["bytes_raw"] == both, "there is no codec"
    assert figures["kept_samples"] == 2 * sum(SIZES)
    assert figures["failures"] == 0


def test_class_accuracies_add_up(done: Path) -> None:
    for row in table(done, "rounds"):
        classes = [entry for entry in table(done, "classes") if entry["round"] == row["round"]]
        assert sum(int(entry["samples"]) for entry in classes) == 40
        right = sum(int(entry["samples"]) * float(entry["accuracy"] or 0) for entry in classes)
        assert right == pytest.approx(40 * float(row["accuracy"]))


def block() -> dict[str, tuple[int, ...]]:
    """Shapes of a block's parameters."""
    c = WIDTH
    linear = {"attn.qkv": (3 * c, c), "attn.proj": (c, c), "mlp.fc1": (4 * c, c), "mlp.fc2": (c, 4 * c)}
    shapes: dict[str, tuple[int, ...]] = {f"{name}.{leaf}": (c,) for name in ("norm1", "norm2") for leaf in WEIGHT_BIAS}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


WEIGHT_BIAS = ("weight", "bias")


def front() -> dict[str, tuple[int, ...]]:
    """Shapes of the embedding and two blocks."""
    shapes = {"pos_embed": (1, TOKENS, WIDTH), "patch_embed.proj.weight": (WIDTH, 3, 4, 4)}
    shapes |= {"patch_embed.proj.bias": (WIDTH,)}
    return shapes | {f"blocks.{number}.{name}": shape for number in (0, 1) for name, shape in block().items()}


def tail() -> dict[str, tuple[int, ...]]:
    """Shapes of the last block, the norm after pooling and the classifier."""
    shapes = {f"blocks.{DEPTH - 1}.{name}": shape for name, shape in block().items()}
    norm = {f"fc_norm.{leaf}": (WIDTH,) for leaf in WEIGHT_BIAS}
    return shapes | norm | {"head.weight": (CLASSES, WIDTH), "head.bias": (CLASSES,)}


def frame_bytes(shapes: dict[str, tuple[int, ...]], labels: int = 0) -> int:
    """The length of a safetensors frame by its definition: 8 bytes, a JSON header padded to 8, the data."""
    header: dict[str, Any] = {}
    at = 0
    if labels:
        header["labels"] = {"dtype": "I64", "shape": [labels], "data_offsets": [0, 8 * labels]}
        at = 8 * labels
    for name in sorted(shapes):
        size = 4 * math.prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [at, at + size]}
        at += size
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-text // 8) * 8 + at


def test_frame_bytes_of_a_known_frame() -> None:
    """The definition above against a header written out by hand."""
    header = '{"x":{"dtype":"F32","shape":[8,16,96],"data_offsets":[0,49152]}}'
    assert len(header) == 64
    assert frame_bytes({"x": (8, 16, 96)}) == 8 + 64 + 4 * 8 * 16 * 96


def batch_sizes() -> dict[int, list[int]]:
    """Client to the sizes of its batches in a round."""
    sizes = {client: [min(BATCH, size - at) for at in range(0, size, BATCH)] for client, size in enumerate(SIZES)}
    return {client: each[:STEPS] for client, each in sizes.items()}


def with_raw(expected: dict[str, int]) -> dict[str, int]:
    """A row of the ledger of a run without codecs."""
    return expected | {f"raw_{name}": count for name, count in expected.items()}


def test_ledger_of_the_u_shape_by_hand(done: Path) -> None:
    assert batch_sizes() == {0: [8, 2], 1: [8, 8, 8], 2: [8, 8, 4]}
    cut = sum(frame_bytes({"x": (b, TOKENS, WIDTH)}) for each in batch_sizes().values() for b in each)
    parameters = 3 * frame_bytes(front() | tail())
    expected = {"activations_up": cut, "activations_down": cut, "gradients_up": cut, "gradients_down": cut}
    expected |= {"parameters_up": parameters, "parameters_down": parameters}
    for row in table(done, "ledger"):
        assert {name: int(value) for name, value in row.items() if name != "round"} == with_raw(expected)
    count = sum(math.prod(shape) for shape in (front() | tail()).values())
    figures = summary(done)
    assert figures["client_trainable_params"] == count
    assert figures["trainable_params"] == count + 5 * sum(math.prod(shape) for shape in block().values())


def test_ledger_of_the_vanilla_shape_by_hand(tmp_path: Path) -> None:
    folder = run(tiny(cut__shape="vanilla", cut__tail=0, rounds=1), tmp_path / "run")
    sizes = [b for each in batch_sizes().values() for b in each]
    parameters = 3 * frame_bytes(front())
    expected = {
        "activations_up": sum(frame_bytes({"x": (b, TOKENS, WIDTH)}, labels=b) for b in sizes),
        "activations_down": 0,
        "gradients_up": 0,
        "gradients_down": sum(frame_bytes({"x": (b, TOKENS, WIDTH)}) for b in sizes),
        "parameters_up": parameters,
        "parameters_down": parameters,
    }
    (row,) = table(folder, "ledger")
    assert {name: int(value) for name, value in row.items() if name != "round"} == with_raw(expected)


def test_half_precision_halves_the_cut(done: Path, tmp_path: Path) -> None:
    folder = run(tiny(wire__activations_up="half", rounds=1), tmp_path / "run")
    mine, other = table(folder, "ledger")[0], table(done, "ledger")[0]
    frames = sum(len(each) for each in batch_sizes().values())
    less = int(other["activations_up"]) - int(mine["activations_up"])
    data = sum(2 * b * TOKENS * WIDTH for each in batch_sizes().values() for b in each)
    assert abs(less - data) <= 16 * frames, "only the headers' padding may differ"
    assert mine["gradients_up"] == other["gradients_up"]
    assert {name: count for name, count in mine.items() if name.startswith("raw_")} == {
        name: count for name, count in other.items() if name.startswith("raw_")
    }


def test_the_model_loads_back(done: Path, tmp_path: Path) -> None:
    figures = summary(done)
    model = load_file(done / "model.safetensors")
    assert runs.sha256(model) == figures["weights_sha256"]
    config = tiny(model__checkpoint=str(done / "model.safetensors"), optimizer__lr=0.0, rounds=1)
    again = summary(run(config, tmp_path / "again"))
    assert (again["accuracy"], again["loss"]) == (figures["accuracy"], figures["loss"])
    assert again["weights_sha256"] == figures["weights_sha256"]
    fresh = summary(run(tiny(optimizer__lr=0.0, rounds=1), tmp_path / "fresh"))
    assert fresh["loss"] != figures["loss"], "training has changed the model"


def test_the_config_runs_again(done: Path, tmp_path: Path) -> None:
    from fedsplit.cli.main import main

    folder = tmp_path / "again"
    command = ["run", "--config", str(done / "config.toml"), "--set", "out=", "--out", str(folder), "--quiet"]
    assert main(command) == 0
    assert summary(folder)["weights_sha256"] == summary(done)["weights_sha256"]
    assert (folder / "ledger.csv").read_bytes() == (done / "ledger.csv").read_bytes()
    assert load([folder / "config.toml"]).replace(out="") == tiny()


def test_personalised_columns_stand_apart(tmp_path: Path) -> None:
    with_own = run(tiny(data__local_test=0.3, eval__per_client=True), tmp_path / "with")
    without = run(tiny(data__local_test=0.3), tmp_path / "without")
    for row in table(without, "clients"):
        assert row["personal_accuracy"] == "" and row["personal_samples"] == "0"
    assert all(row["personal_accuracy"] == "" for row in table(without, "rounds"))
    assert summary(without)["personal_accuracy"] is None
    for one, two in zip(table(with_own, "rounds"), table(without, "rounds"), strict=True):
        same = set(one) - {"personal_accuracy", "wall_s"}
        assert {name: one[name] for name in same} == {name: two[name] for name in same}, "nothing global changes"
        clients = [row for row in table(with_own, "clients") if row["round"] == one["round"]]
        assert [int(row["personal_samples"]) for row in clients] == [3, 9, 6]
        right = [round(float(row["personal_accuracy"]) * int(row["personal_samples"]), 6) for row in clients]
        assert all(count == int(count) for count in right), "an accuracy over its own samples"
        assert float(one["personal_accuracy"]) == pytest.approx(sum(right) / 18)
    assert [int(row["samples"]) for row in table(with_own, "clients")[:3]] == [7, 21, 14]
    assert summary(with_own)["personal_accuracy"] == float(table(with_own, "rounds")[-1]["personal_accuracy"])


def test_rounds_between_evaluations_have_empty_cells(done: Path, tmp_path: Path) -> None:
    every = run(tiny(rounds=3), tmp_path / "every")
    rare = run(tiny(rounds=3, eval__every=2), tmp_path / "rare")
    full, rows = table(every, "rounds"), table(rare, "rounds")
    assert (rows[0]["accuracy"], rows[0]["loss"]) == ("", "")
    for number in (1, 2):
        assert (rows[number]["accuracy"], rows[number]["loss"]) == (full[number]["accuracy"], full[number]["loss"])
    assert {row["round"] for row in table(rare, "classes")} == {"2", "3"}
    assert summary(rare)["weights_sha256"] == summary(every)["weights_sha256"]


@pytest.mark.parametrize("schedule", ["splitfed-v1", "sequential"])
def test_the_virtual_clock_by_hand(schedule: str, tmp_path: Path) -> None:
    flops, server, up, down, latency, watts = 1e9, 5e9, 1e6, 4e6, 0.01, 3.0
    config = tiny(
        server__schedule=schedule,
        devices__flops_per_s=flops,
        devices__server_flops_per_s=server,
        devices__up_bytes_per_s=up,
        devices__down_bytes_per_s=down,
        devices__latency_s=latency,
        devices__active_w=watts,
    )
    folder = run(config, tmp_path / "run")
    clients = table(folder, "clients")
    seconds: dict[str, list[float]] = {"1": [], "2": []}
    for row in clients:
        sent = {
            way: sum(int(v) for k, v in row.items() if k.startswith("bytes_") and k.endswith(way))
            for way in ("up", "down")
        }
        active = int(row["client_flops"]) / flops + sent["up"] / up + sent["down"] / down
        # A model down and an update up; in each step two exchanges of two messages.
        waiting = int(row["server_flops"]) / server + (2 + 4 * int(row["steps"])) * latency
        assert float(row["virtual_s"]) == pytest.approx(active + waiting)
        assert float(row["energy_j"]) == pytest.approx(active * watts)
        seconds[row["round"]].append(active + waiting)
    together = max if schedule == "splitfed-v1" else sum
    for row in table(folder, "rounds"):
        assert float(row["virtual_s"]) == pytest.approx(together(seconds[row["round"]]))
    figures = summary(folder)
    assert figures["virtual_s"] == pytest.approx(together(seconds["1"]) + together(seconds["2"]))
    assert figures["energy_j"] == pytest.approx(sum(float(row["energy_j"]) for row in clients))
    samples = {client: sum(each) for client, each in batch_sizes().items()}
    for name in ("client_flops", "server_flops"):
        each = {int(row[name]) / samples[int(row["client"])] for row in clients}
        assert len(each) == 1, "the same for every sample that a client has trained on"


def test_an_infinite_device_takes_no_time(done: Path) -> None:
    assert summary(done)["virtual_s"] == 0.0 and summary(done)["energy_j"] == 0.0
    assert summary(done)["wall_s"] > 0.0


def test_the_default_folder_is_named_by_time_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny(rounds=1, name="my study/1")
    folder = experiment.run(config, Loop(config))
    assert folder.parent == tmp_path / "runs" and folder.name.endswith("-my-study-1")
    assert runs.fresh(tmp_path / "runs", "my study/1") != folder


def test_weights_are_those_of_the_rounds(done: Path) -> None:
    """The model of the folder is the state of its last checkpoint."""
    state = load_file(done / "checkpoint" / "round-000002" / "state.safetensors")
    model = load_file(done / "model.safetensors")
    trained = {name.removeprefix("model|"): value for name, value in state.items() if name.startswith("model|")}
    assert set(trained) == set(world(tiny()).trains.names)
    assert all(torch.equal(model[name], value) for name, value in trained.items())
