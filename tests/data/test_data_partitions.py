from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsplit import rng
from fedsplit.data import partitions, sources
from fedsplit.data.partitions import PARTITIONS, deal, hold_out, long_tail, plot
from fedsplit.settings import Data
from fedsplit.types import FedsplitError, Images

CLASSES = tuple("0123456789")
# Settings under which every partition works out on the digits with 8 devices.
WORKS: dict[str, dict[str, Any]] = {"size": {"sizes": "100,200,50,60,70,80,90,110"}, "exponential": {"min_samples": 1}}


@pytest.fixture(scope="module")
def digits() -> tuple[Images, Images]:
    found = sources.load(Data(), 8)
    groups = np.asarray([f"writer {i % 11}" for i in range(len(found.train))])
    return Images(found.train.pixels, found.train.labels, groups), found.test


def images(labels: Any, groups: Any = None) -> Images:
    labels = np.asarray(labels, dtype=np.int64)
    return Images(np.zeros((len(labels), 1, 1, 3), np.uint8), labels, groups)


def give(digits: tuple[Images, Images], name: str, devices: int = 8, seed: int = 0, **more: Any):
    settings = Data(partition=name, **{"allow_missing_classes": True, **WORKS.get(name, {}), **more})
    return deal(*digits, CLASSES, settings, devices, seed)


def refusal(train: Images, test: Images, devices: int, **settings: Any) -> str:
    with pytest.raises(FedsplitError) as caught:
        deal(train, test, CLASSES, Data(**settings), devices, 0)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    return message


@pytest.mark.parametrize("name", PARTITIONS)
def test_every_partition_deals_disjoint_sorted_samples(digits: tuple[Images, Images], name: str):
    devices = {"exponential": 5, "pathological": 10}.get(name, 8)
    parts = give(digits, name, devices)
    assert len(parts) == devices and all(part.dtype == np.int64 for part in parts)
    flat = np.concatenate(parts)
    assert len(np.unique(flat)) == len(flat) and flat.min() >= 0 and flat.max() < 1200
    assert all(np.all(np.diff(part) > 0) for part in parts)
    if name != "size":
        assert len(flat) == 1200


@pytest.mark.parametrize("name", PARTITIONS)
def test_devices_hold_what_the_partitioner_itself_deals(
    digits: tuple[Images, Images], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    devices = {"exponential": 5, "pathological": 10}.get(name, 7)
    more = {"sizes": "100,200,50,60,70,80,90"} if name == "size" else {}
    ours = give(digits, name, devices, **more)
    tables: list[Any] = []

    def with_its_own_table(request: Any) -> Any:
        partitioner = PARTITIONS[name](request)
        deals = partitioner.load_partition

        def load_partition(device: int) -> Any:
            if not tables:
                deals(0)
                tables.append(partitioner.dataset)
            partitioner._dataset = tables[0]
            return deals(device)["index"][:]

        partitioner.load_partition = load_partition
        return partitioner

    monkeypatch.setattr(partitions, "PARTITIONS", {**PARTITIONS, name: with_its_own_table})
    theirs = give(digits, name, devices, cache=str(tmp_path / "theirs"), **more)
    assert len(tables) == 1 and all(map(np.array_equal, ours, theirs))


@pytest.mark.parametrize("name", sorted(set(PARTITIONS) - {"natural-id"}))
def test_the_seed_decides(digits: tuple[Images, Images], name: str, tmp_path: Path):
    devices = 5 if name == "exponential" else 8
    parts = [
        give(digits, name, devices, seed, cache=str(tmp_path / where)) for seed, where in ((3, "a"), (3, "b"), (4, "a"))
    ]
    assert all(map(np.array_equal, parts[0], parts[1]))
    assert not all(map(np.array_equal, parts[0], parts[2]))


def test_iid_ignores_the_stored_order():
    labels = np.repeat(np.arange(10), 100)
    parts = deal(images(labels), images(labels), CLASSES, Data(partition="iid"), 5, 0)
    counts = np.stack([np.bincount(labels[part], minlength=10) for part in parts])
    assert counts.min() >= 5 and counts.sum(1).tolist() == [200] * 5


def test_alpha_rules_the_dirichlet_skew(digits: tuple[Images, Images]):
    def skew(alpha: float) -> float:
        parts = give(digits, "dirichlet", alpha=alpha)
        counts = np.stack([np.bincount(digits[0].labels[part], minlength=10) for part in parts])
        return float((counts.max(1) / counts.sum(1)).mean())

    assert skew(100.0) < 0.2 < 0.4 < skew(0.1)


@pytest.mark.parametrize("name", ["pathological", "shard"])
def test_a_device_holds_few_classes(digits: tuple[Images, Images], name: str):
    parts = give(digits, name, 10, classes_per_device=2, shards_per_device=2)
    held = [len(np.unique(digits[0].labels[part])) for part in parts]
    assert max(held) <= (2 if name == "pathological" else 4)
    assert len(np.unique(digits[0].labels[np.concatenate(parts)])) == 10


def test_sizes_are_those_asked_for(digits: tuple[Images, Images]):
    for name in ("size", "inner-dirichlet"):
        assert [len(part) for part in give(digits, name, 3, sizes="10,20,30")] == [10, 20, 30]
        assert [len(part) for part in give(digits, name, 3, sizes="40")] == [40] * 3


def test_inner_dirichlet_bears_a_class_that_is_absent():
    labels = np.tile([0, 2, 9], 40)
    parts = deal(images(labels), images(labels), CLASSES, Data(partition="inner-dirichlet", alpha=5.0), 4, 0)
    assert sum(len(part) for part in parts) == 120


def test_a_natural_group_is_never_torn(digits: tuple[Images, Images]):
    groups = digits[0].groups
    assert groups is not None
    for devices in (11, 4):
        parts = give(digits, "natural-id", devices)
        held = [set(groups[part]) for part in parts]
        assert sum(map(len, held)) == 11 and set().union(*held) == set(groups)


def test_an_unknown_partition_gets_a_hint(digits: tuple[Images, Images]):
    message = refusal(*digits, 4, partition="dirichlett")
    assert "did you mean 'dirichlet'" in message and "pathological" in message


def test_too_many_devices(digits: tuple[Images, Images]):
    start = time.perf_counter()
    assert "1201 devices" in refusal(*digits, 1201, partition="iid", min_samples=1)
    assert "601 devices of at least 2" in refusal(*digits, 601, partition="iid")
    assert "at least 1" in refusal(*digits, 0)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("name", ["linear", "square", "exponential"])
def test_a_device_left_empty(digits: tuple[Images, Images], name: str):
    message = refusal(*digits, 100, partition=name)
    assert f"data.partition='{name}' cannot deal 1200 samples to 100 devices" in message and "fewer devices" in message


def test_fewer_than_min_samples(digits: tuple[Images, Images]):
    message = refusal(*digits, 8, partition="square", min_samples=20)
    assert "gives device 0 only 5 samples" in message and "lower data.min-samples" in message


def test_min_samples_are_left_after_the_hold_out():
    train = images(np.tile(np.arange(10), 2))
    deal(train, train, CLASSES, Data(partition="iid", min_samples=4), 5, 0)
    assert "at least 5" in refusal(train, train, 5, partition="iid", min_samples=4, local_test=0.25)


def test_a_dirichlet_that_cannot_reach_min_samples(digits: tuple[Images, Images]):
    start = time.perf_counter()
    message = refusal(*digits, 40, partition="dirichlet", alpha=0.01, min_samples=25)
    assert "raise data.alpha, lower data.min-samples" in message
    assert time.perf_counter() - start < 15


@pytest.mark.parametrize(
    ("settings", "devices", "words"),
    [
        ({"partition": "pathological", "classes_per_device": 11}, 8, "lower data.classes-per-device"),
        ({"partition": "pathological", "classes_per_device": 10}, 300, "lower data.classes-per-device"),
        ({"partition": "shard", "shards_per_device": 200}, 8, "lower data.shards-per-device"),
        ({"partition": "size", "sizes": ""}, 8, "data.sizes one whole number"),
        ({"partition": "size", "sizes": "1,2"}, 8, "names 2 devices"),
        ({"partition": "size", "sizes": "1200,1"}, 2, "asks for 1201"),
        ({"partition": "size", "sizes": "5,-1"}, 2, "at least 1 a device"),
        ({"partition": "natural-id"}, 12, "only 11 groups"),
    ],
)
def test_what_a_partition_refuses(digits: tuple[Images, Images], settings: dict[str, Any], devices: int, words: str):
    assert words in refusal(*digits, devices, **settings)


def test_natural_id_without_groups(digits: tuple[Images, Images]):
    assert "no column named group, writer or user" in refusal(digits[1], digits[1], 4, partition="natural-id")


def test_a_class_that_no_device_holds():
    train, test = images([0, 1, 2] * 20), images([0, 1, 2, 7, 8])
    message = refusal(train, test, 3, partition="iid")
    assert "class '7' (and 1 more classes)" in message and "allow-missing-classes" in message
    deal(train, test, CLASSES, Data(partition="iid", allow_missing_classes=True), 3, 0)


def test_the_second_deal_imports_and_computes_nothing(digits: tuple[Images, Images], monkeypatch: pytest.MonkeyPatch):
    first = give(digits, "dirichlet")

    def never(*_: object) -> None:
        raise AssertionError("dealt again")

    monkeypatch.setattr(partitions, "_partition", never)
    assert all(map(np.array_equal, first, give(digits, "dirichlet")))
    for changed in ({"alpha": 0.4}, {"min_samples": 3}, {"long_tail": 2.0}, {"seed": 1}, {"devices": 7}):
        with pytest.raises(AssertionError, match="dealt again"):
            give(digits, "dirichlet", **changed)


def test_a_worker_never_imports_the_partitioners(digits: tuple[Images, Images], monkeypatch: pytest.MonkeyPatch):
    first = give(digits, "dirichlet")
    for name in ("datasets", "flwr_datasets", "flwr_datasets.partitioner"):
        monkeypatch.setitem(sys.modules, name, None)
    assert all(map(np.array_equal, first, give(digits, "dirichlet")))
    with pytest.raises(FedsplitError, match="needs the package 'datasets'"):
        give(digits, "dirichlet", seed=1)


@pytest.mark.parametrize("factor", [1.0, 2.0, 10.0, 100.0])
def test_long_tail_counts_follow_the_formula(factor: float):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 500))
    kept = long_tail(labels, 10, factor, 7)
    expected = [int(500 * factor ** (-c / 9) + 1e-9) for c in range(10)]
    assert np.bincount(labels[kept]).tolist() == expected and expected[-1] == 500 / factor
    assert np.all(np.diff(kept) > 0) and kept.dtype == np.int64


def test_long_tail_draws_from_its_stream():
    labels = np.repeat(np.arange(4), 50)
    assert np.array_equal(long_tail(labels, 4, 10.0, 1), long_tail(labels, 4, 10.0, 1))
    assert not np.array_equal(long_tail(labels, 4, 10.0, 1), long_tail(labels, 4, 10.0, 2))


def test_long_tail_edges():
    labels = np.asarray([0, 0, 0, 2, 5])
    uneven = np.repeat([0, 2, 5], [30, 20, 10])  # a class keeps one at least, and an absent one stays absent
    assert np.bincount(uneven[long_tail(uneven, 6, 1e6, 0)], minlength=6).tolist() == [30, 0, 1, 0, 0, 1]
    assert long_tail(np.zeros(5, np.int64), 1, 100.0, 0).tolist() == [0, 1, 2, 3, 4]
    assert long_tail(labels, 6, 1.0, 0).tolist() == [0, 1, 2, 3, 4]


def test_deal_cuts_the_long_tail_first(digits: tuple[Images, Images]):
    parts = give(digits, "iid", long_tail=10.0, seed=5)
    kept = long_tail(digits[0].labels, 10, 10.0, rng.key(5, "long-tail"))
    assert np.array_equal(np.sort(np.concatenate(parts)), kept) and len(kept) < 600


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 0.9])
def test_hold_out_splits_each_class_in_proportion(fraction: float):
    labels = np.repeat([0, 1, 2, 3], [100, 40, 20, 400])
    mine = np.arange(0, 160)
    train, held = hold_out(mine, labels, fraction, 3)
    assert np.array_equal(np.sort(np.concatenate([train, held])), mine)
    assert len(held) == round(160 * fraction) and np.all(np.diff(train) > 0)
    assert np.abs(np.bincount(labels[held], minlength=3)[:3] - fraction * np.array([100, 40, 20])).max() <= 1


def test_hold_out_edges():
    labels = np.asarray([0, 0, 0, 0, 0, 0, 0, 1])
    train, held = hold_out(np.arange(8), labels, 0.25, 0)
    assert 7 in train and len(held) == 2
    for fraction in (0.01, 0.9):
        train, held = hold_out(np.array([4, 2]), labels, fraction, 0)
        assert len(train) == len(held) == 1
    with pytest.raises(FedsplitError, match="data.min-samples"):
        hold_out(np.array([1]), labels, 0.5, 0)
    assert len(hold_out(np.array([1]), labels, 0.0, 0)[1]) == 0
    draws = {tuple(hold_out(np.arange(8), labels, 0.25, stream)[1]) for stream in (1, 1, 2, 3, 4)}
    assert len(draws) > 1


@pytest.mark.parametrize(("devices", "classes"), [(1, 1), (10, 10), (100, 196)])
def test_a_picture_of_any_size(tmp_path: Path, devices: int, classes: int):
    from PIL import Image

    labels = np.random.default_rng(0).integers(0, classes, 3000)
    parts = np.array_split(np.arange(3000), devices)
    plot(parts, labels, [f"a class {i}" for i in range(classes)], tmp_path / "made" / "parts.png")
    with Image.open(tmp_path / "made" / "parts.png") as image:
        assert min(image.size) > 300 and max(image.size) < 3000
