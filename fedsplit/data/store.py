"""The cache folder: arrays that are costly to make, kept on disk and safe to race for.

A file appears under its name complete or not at all, and its name says all that decides its
content, so several processes may write the same file at once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

log = logging.getLogger(__name__)
Array = npt.NDArray[Any]


def folder(cache: str) -> Path | None:
    """The cache folder, made when missing: `cache`, else the user's; None when it cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(cache).expanduser() if cache else Path(home).expanduser() / "fedsplit"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        log.warning("cannot write the cache folder %s (%s): working in memory; set data.cache.", path, error.strerror)
        return None


def digest(*parts: object) -> str:
    """A short name for content decided by `parts`; arrays count by type, shape and bytes."""
    made = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            made.update(f"{part.dtype.str}{part.shape}".encode())
            made.update(np.ascontiguousarray(part).tobytes())
        else:
            made.update(repr(part).encode())
        made.update(b"\0")
    return made.hexdigest()


def save_stream(path: Path, shape: tuple[int, ...], chunks: Iterable[npt.NDArray[np.uint8]]) -> bool:
    """Write `chunks`, joined along the first axis to `shape`, as one .npy; False when the disk refuses."""

    def write(file: IO[bytes]) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        # Plain writes, not a writable memory map: a full disk is then an error, not a dead process.
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk).data)

    return _save(path, write)


def load_stream(path: Path, tail: tuple[int, ...]) -> npt.NDArray[np.uint8] | None:
    """A uint8 .npy (S, *tail), memory-mapped read-only; None when absent or broken."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.dtype == np.uint8 and found.shape[1:] == tail else None


def save_arrays(path: Path, **arrays: Array) -> bool:
    """Write named arrays as one .npz; False when the disk refuses."""
    return _save(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def load_arrays(path: Path) -> dict[str, Array] | None:
    """The named arrays of a .npz; None when absent or broken."""
    import zipfile
    import zlib

    try:
        with np.load(path, allow_pickle=False) as found:
            return dict(found)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        return None


def _save(path: Path, write: Callable[[IO[bytes]], None]) -> bool:
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            write(file)
        os.replace(temporary, path)
        return True
    except OSError as error:
        log.warning("cannot write %s (%s): working in memory; set data.cache.", path, error.strerror)
        return False
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
