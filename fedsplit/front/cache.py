"""Outputs of a frozen front, computed once and kept for later epochs and rounds."""

from __future__ import annotations

import errno
import heapq
import logging
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from io import FileIO
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsplit.config import Config
from fedsplit.data import store
from fedsplit.data.batches import to_batch
from fedsplit.front.vit import Part, Start
from fedsplit.rng import key, numpy_rng
from fedsplit.types import Images

log = logging.getLogger(__name__)
Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
FLOAT_BYTES = 4


class FrontCache:
    """Tokens of the training samples as a frozen front gives them, up to `start` (see `Part`).

    Two accounts, with the same limits, `front.cache-memory-bytes` and `front.cache-disk-bytes`. What
    is really kept is shared by the devices that this process plays, and limited per process. What a
    device could keep (`fits`) is its own: it decides the FLOPs in the ledger, which must not depend
    on how devices are spread over processes. Kept or computed, the tokens are the same to the bit.
    """

    def __init__(self, front: Part, start: Start, config: Config, images: Images, look: Mapping[str, Any]) -> None:
        self.front, self.start, self.config = front, start, config
        self.key = key(config.seed, "cache")
        self._images, self._look = images, look
        self._frozen = [parameter for parameter in front.parameters() if not parameter.requires_grad]
        self._built = self._version()
        self._owner = 0
        self._store: Store | None = None

    def tokens(self, indices: Indices) -> Tensor:
        """Tokens (B, N, C) of the samples `indices` (B,), on the front's device.

        Raises:
            RuntimeError: a frozen parameter of the front has changed, which only a bug can do.
        """
        if self._version() != self._built:
            raise RuntimeError("a frozen parameter of the front has changed: its kept outputs are not true any more")
        if not self.sound:
            return self._run(self._pixels(indices))
        kept = self.store()
        out, found = kept.get(indices)
        if not found.all():
            new = self._run(self._pixels(indices[~found]))
            kept.put(indices[~found], new.cpu().numpy())
            if not found.any():
                return new
            out[torch.from_numpy(~found)] = new.cpu()
        return out.to(self._look["device"])

    def fits(self, samples: int, client: int) -> Mask:
        """Which (S,) of the `samples` samples of device `client` its own memory and disk can hold, by seed."""
        limits = self.config.front
        size = self.sample_bytes
        rows = limits.cache_memory_bytes // size + limits.cache_disk_bytes // size if self.sound else 0
        return _ranks(key(self.key, "device", client), samples) < rows

    @property
    def sample_bytes(self) -> int:
        """What one sample's tokens take, in bytes."""
        return FLOAT_BYTES * math.prod(self.shape)

    @property
    def sound(self) -> bool:
        """Whether a sample's tokens are the same to the bit in every batch, as tried once; if not, nothing is kept."""
        return self._tried[0]

    @property
    def samples(self) -> int:
        """How many training samples there are."""
        return len(self._images)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (N, C) of a sample's tokens."""
        return self._tried[1]

    @cached_property
    def _tried(self) -> tuple[bool, tuple[int, ...]]:
        """Whether a few samples give the same tokens alone and in batches as training has them; their shape (N, C)."""
        total, settings = len(self._images), self.config
        few = self._pixels(np.arange(min(3, total)))
        alone = torch.cat([self._run(few[place : place + 1]) for place in range(len(few))])
        sizes = {2, 3, settings.local.batch_size, *([settings.eval.batch_size] if settings.data.select else [])}
        same = True
        for size in sorted({min(size, total) for size in sizes}):
            order = torch.arange(size, device=few.device) % len(few)
            same = same and torch.equal(self._run(few[order]), alone[order])
        if not same:
            log.warning("a sample's front output depends on its batch on this machine: front.cache keeps nothing.")
        return same, tuple(alone.shape[1:])

    def store(self) -> Store:
        """Where this process keeps what it computed."""
        # A forked child must not write into its parent's file.
        if self._store is None or self._owner != os.getpid():
            ranks = _ranks(self.key, len(self._images))
            limits = self.config.front
            disk = limits.cache_disk_bytes
            self._store = Store(ranks, self.shape, limits.cache_memory_bytes, disk, self.config.data.cache)
            self._owner = os.getpid()
        return self._store

    def _pixels(self, indices: Indices) -> Tensor:
        return to_batch(self._images, indices, kind="none", stream=0, **self._look).x

    def _run(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.front.begin(x) if self.start == "begun" else cast(Tensor, self.front(x))

    def _version(self) -> int:
        return sum(parameter._version for parameter in self._frozen)


class Store:
    """Float32 arrays of one `shape` by sample: in memory, past `memory_bytes` on disk, past `disk_bytes` no more.

    A sample of lower rank, by `ranks` (S,), pushes one of higher rank out where all is full: which
    samples are kept depends on which came, not on their order. The file is in the folder of
    `data.cache` or the system's temporary one, and has no name: it goes with the process, however
    that ends. Where the disk refuses, memory has to do.
    """

    def __init__(
        self, ranks: Indices, shape: tuple[int, ...], memory_bytes: int, disk_bytes: int, folder: str = ""
    ) -> None:
        self._ranks = ranks
        self._bytes = FLOAT_BYTES * math.prod(shape)
        self.in_memory = min(memory_bytes // self._bytes, len(ranks))
        # Not touched yet, so not taken from the machine either.
        self._memory = np.empty((self.in_memory, *shape), np.float32)
        self._rows = np.full(len(ranks), -1, np.int64)
        self._highest: list[tuple[int, int]] = []  # a heap of (-rank, sample)
        wanted = min(disk_bytes // self._bytes, len(ranks) - self.in_memory)
        self._file: FileIO | None = None
        if wanted:
            self._file, room_bytes = _nameless(folder)
            wanted = min(wanted, room_bytes // self._bytes)
        self.rows = self.in_memory + wanted
        if self._file is not None:
            weakref.finalize(self, self._file.close)

    @property
    def samples(self) -> Indices:
        """The samples that are kept now, ascending."""
        return np.flatnonzero(self._rows >= 0)

    def get(self, indices: Indices) -> tuple[Tensor, Mask]:
        """Arrays (B, *shape) of the samples `indices` (B,), and which (B,) were kept; other rows mean nothing."""
        rows = self._rows[indices]
        found: Mask = rows >= 0
        if len(rows) and found.all() and rows.max() < self.in_memory:
            return torch.from_numpy(self._memory).index_select(0, torch.from_numpy(rows)), found
        out = np.empty((len(rows), *self._memory.shape[1:]), np.float32)
        for place in np.flatnonzero(found):
            if rows[place] < self.in_memory:
                out[place] = self._memory[rows[place]]
            else:
                found[place] = self._read(int(rows[place]), out[place])
        return torch.from_numpy(out), found

    def put(self, indices: Indices, arrays: npt.NDArray[np.float32]) -> None:
        """Keep `arrays` (B, *shape) of the samples `indices` (B,), as far as their ranks and the limits allow."""
        for index, array in zip(indices.tolist(), arrays, strict=True):
            row = self._row(index) if self._rows[index] < 0 else -1
            if 0 <= row < self.in_memory:
                self._memory[row] = array
                self._rows[index] = row
            elif row >= 0 and self._write(row, array):
                self._rows[index] = row

    def _row(self, index: int) -> int:
        """A row for one more sample: a free one, or that of the highest rank if this one is lower; else -1."""
        entry = (-int(self._ranks[index]), index)
        if len(self._highest) < self.rows:
            heapq.heappush(self._highest, entry)
            return len(self._highest) - 1
        if not self._highest or entry < self._highest[0]:
            return -1
        _, other = heapq.heapreplace(self._highest, entry)
        row, self._rows[other] = int(self._rows[other]), -1
        return row

    def _read(self, row: int, out: npt.NDArray[np.float32]) -> bool:
        if self._file is None:
            return False
        try:
            self._file.seek((row - self.in_memory) * self._bytes)
            return self._file.readinto(out.data) == self._bytes
        except OSError as error:
            self._lose(error)
            return False

    def _write(self, row: int, array: npt.NDArray[np.float32]) -> bool:
        assert self._file is not None
        try:
            self._file.seek((row - self.in_memory) * self._bytes)
            if self._file.write(np.ascontiguousarray(array).data) != self._bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return True
        except OSError as error:
            self._lose(error)
            return False

    def _lose(self, error: OSError) -> None:
        """Go on without the disk."""
        log.warning("cannot keep front outputs on disk (%s): computing them again; see data.cache.", error.strerror)
        assert self._file is not None
        with suppress(OSError):
            self._file.close()
        self._file, self.rows = None, self.in_memory
        self._rows[self._rows >= self.in_memory] = -1
        self._highest = [(-int(self._ranks[index]), int(index)) for index in self.samples]
        heapq.heapify(self._highest)


def _nameless(folder: str) -> tuple[FileIO | None, int]:
    """A file without a name, and how many bytes it may take: half of what is free; none where the disk refuses."""
    try:
        where = store.folder(folder) or tempfile.gettempdir()
        return tempfile.TemporaryFile(dir=where, buffering=0), shutil.disk_usage(where).free // 2
    except OSError as error:
        log.warning("cannot keep front outputs on disk (%s): computing them again; see data.cache.", error.strerror)
        return None, 0


def _ranks(stream: int, samples: int) -> Indices:
    return numpy_rng(stream).permutation(samples)
