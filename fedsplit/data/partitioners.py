"""The partitioners of flwr-datasets that fit a labelled image set, and how our keys set them up.

A builder gets a `Request` and gives an unbound partitioner over the columns `index`, `label`
(without gaps) and, where the source has groups, `group`. What it or the partitioner raises,
`partitions.deal` turns into one sentence with the mend of `MENDS`. Left out: continuous (no
real-valued property here) and distribution (needs a table, and devices in multiples of classes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsplit.settings import Data


@dataclass(frozen=True)
class Request:
    """What a builder may use: `samples` rows for `devices` devices of at least `least` rows each.

    `groups` is the number of natural groups, 0 when the source has none; `seed` has 32 bits.
    """

    samples: int
    devices: int
    least: int
    groups: int
    seed: int
    settings: Data


@dataclass(frozen=True)
class Rows:
    """One column (S,) in the place of a partitioner's table: what it deals are plain index arrays.

    `labels` are the distinct ones, in the order of the table.
    """

    column: npt.NDArray[np.int64]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.column)

    @property
    def num_rows(self) -> int:
        """Number of samples S."""
        return len(self.column)

    def unique(self, column: str) -> Sequence[int]:
        """The distinct labels, the only column that is asked for once all devices are dealt."""
        assert column == "label"
        return self.labels

    def select(self, indices: Any) -> npt.NDArray[np.int64]:
        """The entries at `indices`."""
        return self.column[np.asarray(indices, dtype=np.int64)]

    def shard(self, num_shards: int, index: int, contiguous: bool) -> npt.NDArray[np.int64]:
        """Entry number `index` of `num_shards` of equal size, the first ones larger by one where they must be."""
        assert contiguous
        each, more = divmod(len(self.column), num_shards)
        start = index * each + min(index, more)
        return self.column[start : start + each + (index < more)]


def _iid(request: Request) -> Any:
    from flwr_datasets.partitioner import IidPartitioner

    return IidPartitioner(request.devices)


def _dirichlet(request: Request) -> Any:
    from flwr_datasets.partitioner import DirichletPartitioner

    alpha = float(request.settings.alpha)
    return DirichletPartitioner(request.devices, "label", alpha, request.least, seed=request.seed)


def _inner_dirichlet(request: Request) -> Any:
    from flwr_datasets.partitioner import InnerDirichletPartitioner

    if request.settings.sizes:
        sizes = _sizes(request)
    else:
        sizes = [len(part) for part in np.array_split(np.arange(request.samples), request.devices)]
    return InnerDirichletPartitioner(sizes, "label", float(request.settings.alpha), seed=request.seed)


def _pathological(request: Request) -> Any:
    from flwr_datasets.partitioner import PathologicalPartitioner

    # Of its three modes this one uses every class as soon as there are as many devices as classes.
    classes = request.settings.classes_per_device
    return PathologicalPartitioner(request.devices, "label", classes, "first-deterministic", seed=request.seed)


def _shard(request: Request) -> Any:
    from flwr_datasets.partitioner import ShardPartitioner

    each = request.settings.shards_per_device
    if request.devices * each > request.samples:
        raise ValueError(f"{request.devices} devices of {each} shards need as many samples")
    return ShardPartitioner(request.devices, "label", num_shards_per_partition=each, seed=request.seed)


def _linear(request: Request) -> Any:
    from flwr_datasets.partitioner import LinearPartitioner

    return LinearPartitioner(request.devices)


def _square(request: Request) -> Any:
    from flwr_datasets.partitioner import SquarePartitioner

    return SquarePartitioner(request.devices)


def _exponential(request: Request) -> Any:
    from flwr_datasets.partitioner import ExponentialPartitioner

    return ExponentialPartitioner(request.devices)


def _size(request: Request) -> Any:
    from flwr_datasets.partitioner import SizePartitioner

    return SizePartitioner(_sizes(request))


def _natural_id(request: Request) -> Any:
    from flwr_datasets.partitioner import NaturalIdPartitioner

    if request.groups == 0:
        raise ValueError("the source has no column named group, writer or user")
    if request.groups < request.devices:
        raise ValueError(f"the source has only {request.groups} groups")
    return NaturalIdPartitioner("group")


def _sizes(request: Request) -> list[int]:
    """The sizes of `data.sizes`, one a device; a single number stands for all."""
    try:
        sizes = [int(text) for text in request.settings.sizes.split(",")]
    except ValueError:
        raise ValueError(f"data.sizes='{request.settings.sizes}' is not a list of whole numbers") from None
    sizes = sizes * request.devices if len(sizes) == 1 else sizes
    if len(sizes) != request.devices:
        raise ValueError(f"data.sizes names {len(sizes)} devices")
    if min(sizes) < 1 or sum(sizes) > request.samples:
        raise ValueError(f"data.sizes asks for {sum(sizes)} samples, at least 1 a device")
    return sizes


PARTITIONS: dict[str, Callable[[Request], Any]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "inner-dirichlet": _inner_dirichlet,
    "pathological": _pathological,
    "shard": _shard,
    "linear": _linear,
    "square": _square,
    "exponential": _exponential,
    "size": _size,
    "natural-id": _natural_id,
}

MENDS: Mapping[str, str] = {
    "dirichlet": "raise data.alpha, lower data.min-samples, or use fewer devices",
    "inner-dirichlet": "raise data.alpha, or mend data.sizes",
    "pathological": "lower data.classes-per-device or use fewer devices",
    "shard": "lower data.shards-per-device or use fewer devices",
    "size": "give data.sizes one whole number a device (or one for all), together at most the samples there are",
    "natural-id": "use fewer devices or another data.partition",
}
