from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from picture_files import pictures, png, write_split
from PIL import Image

from fedsplit.data import hub, sources
from fedsplit.settings import Data
from fedsplit.types import DataSet, FedsplitError

DIGITS_HEAD = [8, 9, 5, 9, 9, 8, 4, 2, 4, 9, 8, 3]
SHARED = Path(__file__).parents[3] / "shared" / "data" / "cifar10"


def load(folder: Path, size: int = 8, **settings: Any) -> DataSet:
    return sources.load(Data(source=str(folder), **settings), size)


def refusal(folder: Path, size: int = 8, **settings: Any) -> str:
    with pytest.raises(FedsplitError) as caught:
        load(folder, size, **settings)
    return str(caught.value)


def test_digits_is_a_fixed_stratified_split():
    found = sources.load(Data(), 8)
    again = sources.load(Data(limit=50, test_limit=20), 8)
    assert (len(found.train), len(found.test)) == (1200, 597)
    assert found.train.pixels.shape == (1200, 8, 8, 3) and found.train.pixels.dtype == np.uint8
    assert found.train.pixels.max() == 255 and found.classes == tuple("0123456789")
    assert np.array_equal(found.train.pixels[..., 0], found.train.pixels[..., 2])
    counts = np.bincount(found.train.labels) / (np.bincount(found.train.labels) + np.bincount(found.test.labels))
    assert np.abs(counts - 1200 / 1797).max() < 0.01
    assert np.bincount(found.train.labels[:200]).min() >= 8  # a prefix is a fair sample
    assert np.array_equal(again.train.pixels, found.train.pixels[:50])
    assert np.array_equal(again.test.labels, found.test.labels[:20])


def test_digits_uses_every_sample_once():
    from sklearn.datasets import load_digits

    found = sources.load(Data(), 8)
    ours = [*found.train.pixels[..., 0], *found.test.pixels[..., 0]]
    theirs = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
    assert sorted(image.tobytes() for image in ours) == sorted(image.tobytes() for image in theirs)


def test_digits_split_never_changes():
    # Pinned: published figures rest on it.
    assert sources.load(Data(limit=12), 8).train.labels.tolist() == DIGITS_HEAD


def test_digits_refuse_another_size_when_told_not_to_scale():
    with pytest.raises(FedsplitError, match="8 x 8 pixels.*32 x 32"):
        sources.load(Data(resize=False), 32)


def test_a_folder(folder: Path):
    found = load(folder)
    assert found.name == "set" and found.classes == ("ant", "bee", "cow")
    assert found.train.pixels.shape == (20, 8, 8, 3) and found.test.pixels.shape == (6, 8, 8, 3)
    assert found.train.labels.tolist() == [i % 3 for i in range(20)] and found.train.labels.dtype == np.int64
    expected = [np.asarray(Image.open(io.BytesIO(blob))) for blob in pictures(20)]
    assert np.array_equal(found.train.pixels, np.stack(expected))
    assert found.train.groups is None
    with pytest.raises(ValueError):
        found.train.pixels[0] = 0


def test_limits_take_a_prefix_and_keep_the_classes(folder: Path):
    whole, part = load(folder), load(folder, limit=2, test_limit=1)
    assert len(part.train) == 2 and len(part.test) == 1 and part.classes == whole.classes
    assert np.array_equal(part.train.pixels, whole.train.pixels[:2])
    assert len(load(folder, limit=1000).train) == 20


def test_a_limit_decodes_no_more_than_it_needs(folder: Path):
    write_split(folder / "train.parquet", [*pictures(8), b"broken"], [0] * 9, ["ant", "bee", "cow"])
    assert len(load(folder, limit=8, allow_missing_classes=True).train) == 8
    assert "row 8" in refusal(folder)


def test_the_first_classes_alone(folder: Path):
    whole, some, few = load(folder), load(folder, classes=2), load(folder, classes=2, limit=3)
    rows = whole.train.labels < 2
    for _ in range(2):  # decoded, then from the cache
        some = load(folder, classes=2)
        assert some.classes == whole.classes[:2] and some.test.labels.tolist() == [0, 1, 0, 1]
        assert np.array_equal(some.train.pixels, whole.train.pixels[rows])
    assert few.train.labels.tolist() == [0, 1, 0] and np.array_equal(few.train.pixels, some.train.pixels[:3])
    assert "data.classes=9" in refusal(folder, classes=9) and len(load(folder, classes=3).train) == 20


def test_the_first_classes_of_the_digits():
    found, whole = sources.load(Data(classes=3), 8), sources.load(Data(), 8)
    assert found.classes == ("0", "1", "2") and set(found.test.labels.tolist()) == {0, 1, 2}
    assert np.array_equal(found.train.pixels, whole.train.pixels[whole.train.labels < 3])


def test_a_broken_image_is_named_by_its_row_in_the_file(folder: Path):
    write_split(folder / "train.parquet", [*pictures(3), b"broken"], [0, 1, 1, 0], ["ant", "bee", "cow"])
    assert "row 3" in refusal(folder, classes=1)


@pytest.mark.parametrize("name", ["val.parquet", "validation.parquet"])
def test_other_names_of_the_test_file(folder: Path, name: str):
    (folder / "test.parquet").rename(folder / name)
    assert len(load(folder).test) == 6


@pytest.mark.parametrize("column", ["group", "writer", "user"])
def test_a_group_column(folder: Path, column: str):
    write_split(folder / "train.parquet", pictures(4), [0, 1, 2, 0], **{column: [7, 7, 9, 9]})
    for _ in range(2):  # decoded, then from the cache
        groups = load(folder, limit=3).train.groups
        assert groups is not None and groups.tolist() == ["7", "7", "9"]


def test_class_names_default_to_numbers(folder: Path):
    write_split(folder / "train.parquet", pictures(4), [0, 1, 3, 1])
    assert load(folder, limit=1).classes == ("0", "1", "2", "3")


def test_scaling_is_pillows_bicubic(folder: Path):
    expected = Image.open(io.BytesIO(pictures(1)[0])).resize((12, 12), Image.Resampling.BICUBIC)
    assert np.array_equal(load(folder, 12).train.pixels[0], np.asarray(expected))


def test_every_mode_becomes_rgb(folder: Path):
    grey = np.full((8, 8), 100, np.uint8)
    deep = np.full((8, 8), 100 * 256, np.uint16)
    clear = np.dstack([np.full((8, 8, 3), 100, np.uint8), np.full((8, 8), 9, np.uint8)])
    write_split(folder / "train.parquet", [png(grey), png(deep), png(clear)], [0, 1, 2])
    assert np.all(load(folder).train.pixels == 100)


def test_a_turned_photograph_stands_upright(folder: Path):
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    exif = Image.Exif()
    exif[0x0112] = 3  # half a turn
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    write_split(folder / "train.parquet", [buffer.getvalue()] * 3, [0, 1, 2])
    assert load(folder).train.pixels[0, 0, 0, 0] == 63


def test_missing_files(folder: Path, tmp_path: Path):
    assert "no folder" in refusal(tmp_path / "nowhere")
    assert "is a file" in refusal(folder / "train.parquet")
    (folder / "test.parquet").unlink()
    assert "no test.parquet" in refusal(folder)
    (folder / "train.parquet").unlink()
    assert "no train.parquet" in refusal(folder)


@pytest.mark.parametrize("missing", ["image", "label"])
def test_a_missing_column(folder: Path, missing: str):
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "train.parquet").drop_columns([missing])
    pq.write_table(table, folder / "train.parquet")
    message = refusal(folder)
    assert f"no column '{missing}'" in message and "train.parquet" in message


def test_a_column_of_the_wrong_type(folder: Path):
    write_split(folder / "train.parquet", pictures(2), [0.0, 1.0])
    assert "column label has type double" in refusal(folder)
    write_split(folder / "train.parquet", pictures(2), ["ant", "bee"])
    assert "column label has type string" in refusal(folder)

    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": pictures(2), "label": [0, 1]}), folder / "train.parquet")
    assert "column image has type binary" in refusal(folder)


@pytest.mark.parametrize("blob", [None, b"", b"no image", pictures(1, 64)[0][:-4000]])
def test_a_broken_image_is_named_by_its_row(folder: Path, blob: bytes | None):
    write_split(folder / "train.parquet", [*pictures(9), blob], [0] * 10)
    message = refusal(folder)
    assert "train.parquet, row 9:" in message and message.endswith(".") and "\n" not in message


@pytest.mark.parametrize(("label", "word"), [(-1, "label -1"), (3, "label 3"), (None, "label is empty")])
def test_a_bad_label_is_named_by_its_row(folder: Path, label: int | None, word: str):
    write_split(folder / "train.parquet", pictures(5), [0, 1, 2, label, 0], ["ant", "bee", "cow"])
    message = refusal(folder)
    assert "row 3" in message and word in message


def test_a_test_label_beyond_the_classes(folder: Path):
    write_split(folder / "train.parquet", pictures(3), [0, 1, 1])
    write_split(folder / "test.parquet", pictures(3), [0, 1, 2])
    message = refusal(folder)
    assert "test.parquet, row 2" in message and "from 0 to 1" in message


def test_identifiers_are_not_labels(folder: Path):
    write_split(folder / "train.parquet", pictures(3), [0, 1, 2**40])
    assert "row 2: label 1099511627776" in refusal(folder)


def test_an_empty_file(folder: Path):
    import pyarrow.parquet as pq

    pq.write_table(pq.read_table(folder / "train.parquet").slice(0, 0), folder / "train.parquet")
    assert "holds no rows" in refusal(folder)


def test_a_file_that_is_no_parquet(folder: Path):
    (folder / "test.parquet").write_bytes(b"PAR1 or so they say")
    assert "test.parquet is not a readable Parquet file" in refusal(folder)


def test_another_size_is_refused_when_told_not_to_scale(folder: Path):
    load(folder, 16)  # a cache of scaled images must not hide it
    assert "8 x 8 pixels and the model takes 16 x 16" in refusal(folder, 16, resize=False)
    assert len(load(folder, 8, resize=False).train) == 20


def test_the_hub_out_of_reach_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "_reachable", lambda: False)
    start = time.perf_counter()
    with pytest.raises(FedsplitError, match=r"cannot be reached: use data.source=digits"):
        sources.load(Data(source="fedsplit-test/nothing-here"), 8)
    assert time.perf_counter() - start < 5
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FedsplitError, match="HF_HUB_OFFLINE is set"):
        sources.load(Data(source="fedsplit-test/nothing-here"), 8)


def test_a_silent_hub_is_given_up(monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "PATIENCE_S", 0.1)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: time.sleep(2))
    start = time.perf_counter()
    assert not hub._reachable()
    assert time.perf_counter() - start < 1.5


def hub_split(count: int, seed: int, **columns: Any) -> datasets.Dataset:
    names = datasets.ClassLabel(names=["ant", "bee"])
    kinds = {"photo": datasets.Image(), "kind": names} | {name: datasets.Value("int64") for name in columns}
    rows = {"photo": [{"bytes": blob, "path": None} for blob in pictures(count, seed=seed)]}
    return datasets.Dataset.from_dict(
        {**rows, "kind": [i % 2 for i in range(count)], **columns}, features=datasets.Features(kinds)
    )


def serve(monkeypatch: pytest.MonkeyPatch, **splits: datasets.Dataset) -> list[str]:
    asked: list[str] = []
    monkeypatch.setattr(hub, "_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or datasets.DatasetDict(splits))
    return asked


def test_a_hub_set_is_read_by_column_type_and_only_once(monkeypatch: pytest.MonkeyPatch):
    train = hub_split(6, 0, writer=[1, 1, 2, 2, 3, 3])
    asked = serve(monkeypatch, train=train, validation=hub_split(4, 1))
    first = sources.load(Data(source="some/set", limit=5), 8)
    again = sources.load(Data(source="some/set", limit=5), 8)
    assert asked == ["some/set"] and first.classes == ("ant", "bee")
    assert first.train.labels.tolist() == [0, 1, 0, 1, 0] and len(first.test) == 4
    assert first.train.groups is not None and first.train.groups.tolist() == ["1", "1", "2", "2", "3"]
    assert np.array_equal(first.train.pixels[4], np.asarray(Image.open(io.BytesIO(pictures(6)[4]))))
    assert np.array_equal(first.train.pixels, again.train.pixels)


def test_a_hub_set_without_what_is_needed(monkeypatch: pytest.MonkeyPatch):
    serve(monkeypatch, train=hub_split(4, 0))
    with pytest.raises(FedsplitError, match="has the splits train, but needs"):
        sources.load(Data(source="some/set"), 8)
    serve(monkeypatch, train=hub_split(4, 0).remove_columns("kind"), test=hub_split(4, 0))
    with pytest.raises(FedsplitError, match="no ClassLabel column"):
        sources.load(Data(source="some/set"), 8)


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FedsplitError, match=r"needs the package 'pyarrow': pip install 'fedsplit\[device\]'"):
        load(folder)


def test_importing_the_place_is_cheap():
    heavy = ["datasets", "flwr", "flwr_datasets", "matplotlib", "pyarrow", "ray", "sklearn", "torchvision"]
    code = (
        "import sys; import fedsplit.data.sources, fedsplit.data.partitions, fedsplit.data.batches;"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not (SHARED / "mini_train.parquet").is_file(), reason="no CIFAR-10 beside the project")
def test_cifar10(tmp_path: Path):
    (tmp_path / "train.parquet").symlink_to(SHARED / "mini_train.parquet")
    (tmp_path / "test.parquet").symlink_to(SHARED / "mini_test.parquet")
    found = load(tmp_path, 32)
    assert found.train.pixels.shape == (2000, 32, 32, 3) and len(found.test) == 500
    assert found.classes[0] == "airplane" and np.bincount(found.train.labels).tolist() == [200] * 10
    mean = found.train.pixels.mean(axis=(0, 1, 2)) / 255
    assert np.abs(mean - [0.491, 0.482, 0.447]).max() < 0.02
