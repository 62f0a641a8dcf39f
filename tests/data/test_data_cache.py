from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from picture_files import pictures, write_split

from fedsplit.data import decode, sources, store
from fedsplit.settings import Data
from fedsplit.types import FedsplitError


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for every image that is decoded."""
    seen: list[str] = []
    real = decode._decode

    def counting(blob: bytes | None, size: int, resize: bool, where: str) -> decode.Pixels:
        seen.append(where)
        return real(blob, size, resize, where)

    monkeypatch.setattr(decode, "_decode", counting)
    return seen


def test_a_second_load_decodes_nothing(folder: Path, decoded: list[str]):
    first = sources.load(Data(source=str(folder)), 8)
    assert len(decoded) == 26
    second = sources.load(Data(source=str(folder)), 8)
    assert len(decoded) == 26
    assert isinstance(second.train.pixels, np.memmap)
    assert second.classes == first.classes and np.array_equal(second.train.labels, first.train.labels)
    assert np.array_equal(second.train.pixels, first.train.pixels)


def test_the_cache_equals_the_memory(folder: Path, cache_home: Path):
    cached = sources.load(Data(source=str(folder)), 12)
    cache_home.joinpath("blocked").write_text("a file where a folder is wanted")
    plain = sources.load(Data(source=str(folder), cache=str(cache_home / "blocked")), 12)
    assert not isinstance(plain.train.pixels, np.memmap)
    assert np.array_equal(plain.train.pixels, cached.train.pixels)
    assert np.array_equal(plain.test.labels, cached.test.labels)
    with pytest.raises(ValueError):
        plain.train.pixels[0] = 0


def test_an_unwritable_cache_is_a_warning(folder: Path, cache_home: Path, caplog: pytest.LogCaptureFixture):
    cache_home.write_text("")
    with caplog.at_level(logging.WARNING):
        assert len(sources.load(Data(source=str(folder)), 8).train) == 20
    assert "set data.cache" in caplog.text


def test_a_full_disk_is_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.WARNING):
        assert len(sources.load(Data(source=str(folder)), 8).train) == 20
    assert "No space left" in caplog.text
    assert not list(store.folder("").glob("*"))  # nothing half-written stays


def test_what_decides_the_content_decides_the_name(folder: Path, decoded: list[str]):
    sources.load(Data(source=str(folder)), 8)
    sources.load(Data(source=str(folder)), 9)
    assert len(decoded) == 52
    sources.load(Data(source=str(folder), limit=4), 8)
    assert len(decoded) == 56
    write_split(folder / "train.parquet", pictures(20, seed=5), [0] * 20, ["ant", "bee", "cow"])
    sources.load(Data(source=str(folder)), 8)
    assert len(decoded) == 76


def test_the_folder_of_the_setting_is_used(folder: Path, tmp_path: Path, cache_home: Path):
    sources.load(Data(source=str(folder), cache=str(tmp_path / "mine")), 8)
    assert len(list((tmp_path / "mine").glob("*.npy"))) == 2 and not cache_home.exists()


def test_a_failed_decoding_leaves_nothing(folder: Path):
    write_split(folder / "train.parquet", [*pictures(3), b"x"], [0] * 4)
    with pytest.raises(FedsplitError):
        sources.load(Data(source=str(folder)), 8)
    assert not list(store.folder("").glob("*"))


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"garbage"])
def test_a_damaged_cache_is_made_anew(folder: Path, decoded: list[str], damage: bytes):
    good = np.array(sources.load(Data(source=str(folder)), 8).train.pixels)
    for file in store.folder("").iterdir():
        file.unlink()
        file.write_bytes(damage)
    assert np.array_equal(sources.load(Data(source=str(folder)), 8).train.pixels, good)
    assert len(decoded) == 52


def test_a_truncated_cache_is_made_anew(folder: Path):
    good = np.array(sources.load(Data(source=str(folder)), 8).train.pixels)
    for file in store.folder("").glob("*.npy"):
        whole = file.read_bytes()
        file.unlink()
        file.write_bytes(whole[:-100])
    assert np.array_equal(sources.load(Data(source=str(folder)), 8).train.pixels, good)


def test_a_pickle_is_never_opened(tmp_path: Path):
    np.save(tmp_path / "evil.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "evil.npz", labels=np.array([{}], dtype=object), allow_pickle=True)
    assert store.load_stream(tmp_path / "evil.npy", (8, 8, 3)) is None
    assert store.load_arrays(tmp_path / "evil.npz") is None


def test_a_race_of_writers_never_shows_half_a_file(tmp_path: Path):
    path = tmp_path / "race.npy"
    want = np.arange(64 * 48, dtype=np.int64).astype(np.uint8).reshape(64, 4, 4, 3)
    bad: list[str] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            written = path.exists()  # asked first: a file once there stays readable
            found = store.load_stream(path, (4, 4, 3))
            if written and (found is None or not np.array_equal(found, want)):
                bad.append("unreadable" if found is None else "half")

    def write() -> None:
        for _ in range(30):
            assert store.save_stream(path, want.shape, iter(np.array_split(want, 8)))

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write) for _ in range(4)]
    reader.start()
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    done.set()
    reader.join()
    assert bad == [] and [file.name for file in tmp_path.iterdir()] == ["race.npy"]


def test_digests_tell_values_types_and_borders_apart():
    names = {
        store.digest("ab", "c"),
        store.digest("a", "bc"),
        store.digest(1),
        store.digest("1"),
        store.digest(np.zeros(4, np.uint8)),
        store.digest(np.zeros((2, 2), np.uint8)),
        store.digest(np.zeros(1, np.int32)),
    }
    assert len(names) == 7
    assert store.digest(np.arange(3), "x") == store.digest(np.arange(3), "x")
