"""The kept outputs of a frozen front on a device's disk: a ClientApp is a new process for every message.

One file of rows: a sample, the CRC-32 of its tokens, the tokens. A row that is damaged counts as not kept. The file's
name says what decides its content, and others of the same client go.
"""

from __future__ import annotations

import os
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedsplit.data import store
from fedsplit.front.cache import FrontCache
from fedsplit.runtime.half import frozen_digest
from fedsplit.world import World

CHUNK = 64
SHAPING = ("data.", "model.", "cut.", "front.", "seed", "devices.count")


def file_for(folder: Path, built: World, client: int, *mark: object) -> Path:
    """Where the outputs of `client` are kept; `mark` is what else decides them, such as the state of its pictures."""
    values = sorted(item for item in built.config.values.items() if item[0].startswith(SHAPING))
    return folder / "outputs" / f"{client:06d}" / f"{store.digest(values, frozen_digest(built), *mark)}.npy"


def load(cache: FrontCache, file: Path) -> int:
    """Take in what `file` holds, if it is there; how many samples that were."""
    try:
        rows = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return 0
    if not cache.sound or rows.ndim != 1 or rows.dtype != _dtype(cache):
        return 0
    count = 0
    for start in range(0, len(rows), CHUNK):
        chunk = np.array(rows[start : start + CHUNK])
        good = np.array([zlib.crc32(row["tokens"].tobytes()) == row["check"] for row in chunk], dtype=bool)
        good &= (chunk["sample"] >= 0) & (chunk["sample"] < cache.samples)
        cache.store().put(chunk["sample"][good], chunk["tokens"][good])
        count += int(good.sum())
    return count


def save(cache: FrontCache, file: Path, before: int) -> None:
    """Write what is kept now, if it is more than the `before` samples that the file holds, complete or not at all.

    Raises:
        OSError: the disk does not take it.
    """
    if not cache.sound or len(samples := cache.store().samples) <= before:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.new")
    try:
        with scratch.open("wb") as out:
            header = {"descr": np.lib.format.dtype_to_descr(_dtype(cache)), "fortran_order": False}
            np.lib.format.write_array_header_2_0(out, {**header, "shape": (len(samples),)})
            for start in range(0, len(samples), CHUNK):
                out.write(_rows(cache, samples[start : start + CHUNK]).tobytes())
            out.flush()
            os.fsync(out.fileno())
        os.replace(scratch, file)
    finally:
        scratch.unlink(missing_ok=True)
    for other in file.parent.glob("*.npy"):
        if other != file:
            with suppress(OSError):
                other.unlink()


def _rows(cache: FrontCache, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
    tokens, found = cache.store().get(samples)
    rows = np.zeros(len(samples), _dtype(cache))
    rows["sample"], rows["tokens"] = samples, tokens.numpy()
    rows["check"] = [zlib.crc32(row.tobytes()) for row in rows["tokens"]]
    rows["sample"][~found] = -1
    return rows


def _dtype(cache: FrontCache) -> np.dtype[np.void]:
    return np.dtype([("sample", "<i8"), ("check", "<u4"), ("tokens", "<f4", cache.shape)])
