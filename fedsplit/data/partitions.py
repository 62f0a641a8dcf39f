"""Who holds what: samples dealt to devices by the partitioners of flwr-datasets.

Only an index and a label column are partitioned, never images. Rows are first shuffled by our own
stream, so a stored order (sorted by class, say) never leaks into a partition and the partitioners
without a seed (iid, linear, square, exponential, size) depend on the run's. The result is cached:
a worker of a simulation reads it and never imports `datasets`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsplit import rng
from fedsplit.data import store
from fedsplit.data.partitioners import MENDS, PARTITIONS, Request, Rows
from fedsplit.data.raw import missing_package
from fedsplit.settings import Data
from fedsplit.types import FedsplitError, Images

__all__ = ["PARTITIONS", "deal", "hold_out", "long_tail", "plot", "table"]

Indices = npt.NDArray[np.int64]


def deal(train: Images, test: Images, classes: Sequence[str], settings: Data, devices: int, seed: int) -> list[Indices]:
    """Each device's samples: `devices` disjoint, ascending index arrays into `train`.

    The long tail of `settings.long_tail` is cut first. Reads and writes the cache folder.

    Raises:
        FedsplitError: an unknown partition, too few samples, a device with fewer than
            `settings.min_samples` to train on, a partition that does not work out, or a class of
            the test set that no device holds.
    """
    if settings.partition not in PARTITIONS:
        close = difflib.get_close_matches(settings.partition, PARTITIONS, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        raise FedsplitError(f"data.partition='{settings.partition}' is unknown{hint}; known: {', '.join(PARTITIONS)}.")
    pool = long_tail(train.labels, len(classes), settings.long_tail, rng.key(seed, "long-tail"))
    least = _least(settings)
    if devices < 1:
        raise FedsplitError(f"devices.count must be at least 1, got {devices}.")
    if devices * least > len(pool):
        raise FedsplitError(
            f"{devices} devices of at least {least} samples each need more than the {len(pool)} training samples "
            "there are: use fewer devices, or mend data.min-samples, data.local-test, data.limit or data.long-tail."
        )
    try:
        parts = _cached(train, pool, settings, devices, seed, least)
    except ModuleNotFoundError as error:
        raise missing_package(error, f"data.partition='{settings.partition}'") from error
    _check(parts, train.labels, test.labels, classes, settings, least)
    return parts


def long_tail(labels: npt.NDArray[np.int64], classes: int, factor: float, stream: int) -> Indices:
    """Ascending indices of an exponential long tail: class c keeps `n_max * factor ** (-c / (classes - 1))`.

    `labels` (S,); `n_max` is the largest class; a class keeps at least 1 and at most what it has.
    A `factor` of 1.0 keeps everything, equal classes or not.
    """
    if factor == 1.0:
        return np.arange(len(labels), dtype=np.int64)
    counts = np.bincount(labels, minlength=classes)
    kept: list[Indices] = []
    for number in np.flatnonzero(counts):
        # The guard keeps 500 * 100 ** -1 at 5 where floating point falls just short.
        wanted = int(counts.max() * factor ** (-number / max(1, classes - 1)) + 1e-9)
        members = np.flatnonzero(labels == number)
        order = rng.numpy_rng(rng.key(stream, int(number))).permutation(members)
        kept.append(order[: max(1, wanted)])
    return np.sort(np.concatenate(kept)).astype(np.int64)


def hold_out(indices: Indices, labels: npt.NDArray[np.int64], fraction: float, stream: int) -> tuple[Indices, Indices]:
    """One device's `indices` split in (train, test), both ascending and each class in proportion.

    `labels` (S,) are those of the whole training set. A class of one sample stays in train unless
    `fraction` is above a half; a fraction of 0 gives an empty test part.

    Raises:
        FedsplitError: fewer than 2 samples to split.
    """
    indices = np.sort(np.asarray(indices, dtype=np.int64))
    if fraction == 0.0:
        return indices, indices[:0]
    if len(indices) < 2:
        raise FedsplitError(
            f"A device with {len(indices)} samples has none to hold out: "
            "raise data.min-samples to 2 or more, or set data.local-test=0."
        )
    order = rng.numpy_rng(stream).permutation(indices)
    rank = np.empty(len(order))
    for number in np.unique(labels[order]):
        where = np.flatnonzero(labels[order] == number)
        rank[where] = (np.arange(len(where)) + 0.5) / len(where)
    order = order[np.argsort(rank, kind="stable")]
    cut = _held(len(order), fraction)
    return np.sort(order[cut:]), np.sort(order[:cut])


def _held(samples: int, fraction: float) -> int:
    """How many of a device's samples are held out: some, but never all."""
    return min(max(1, round(samples * fraction)), samples - 1) if fraction > 0 else 0


def _least(settings: Data) -> int:
    """The fewest samples of a device that leave `min_samples` to train on after the hold-out."""
    least = max(settings.min_samples, 2 if settings.local_test > 0 else 1)
    while least - _held(least, settings.local_test) < settings.min_samples:
        least += 1
    return least


def _cached(train: Images, pool: Indices, settings: Data, devices: int, seed: int, least: int) -> list[Indices]:
    folder = store.folder(settings.cache)
    keys = (settings.partition, settings.alpha, settings.classes_per_device, settings.shards_per_device, settings.sizes)
    version = importlib.metadata.version("flwr-datasets")
    groups = "" if train.groups is None else train.groups
    name = store.digest("parts-1", version, np.__version__, *keys, devices, seed, least, train.labels, groups, pool)
    path = folder / f"parts-{name}.npz" if folder else None
    found = store.load_arrays(path) if path else None
    if found is not None and {"flat", "ends"} <= found.keys():
        return np.split(found["flat"], found["ends"][:-1])
    parts = _partition(train, pool, settings, devices, seed, least)
    if path:
        store.save_arrays(path, flat=np.concatenate(parts), ends=np.cumsum([len(part) for part in parts]))
    return parts


def _partition(train: Images, pool: Indices, settings: Data, devices: int, seed: int, least: int) -> list[Indices]:
    import datasets

    rows = rng.numpy_rng(rng.key(seed, "partition", "order")).permutation(pool)
    # Class numbers without gaps: InnerDirichletPartitioner takes them for positions.
    columns: dict[str, Any] = {"index": rows, "label": np.unique(train.labels[rows], return_inverse=True)[1]}
    groups = 0
    if train.groups is not None:
        names, numbers = np.unique(train.groups[rows], return_inverse=True)
        groups = len(names)
        columns["group"] = numbers % devices
    request = Request(len(rows), devices, least, groups, rng.key(seed, "partition") % 2**32, settings)
    with warnings.catch_warnings(), np.errstate(all="ignore"), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            partitioner = PARTITIONS[settings.partition](request)
            partitioner.dataset = datasets.Dataset.from_dict(columns).with_format("numpy")
            partitioner.load_partition(0)  # it decides about all devices, and may sort the table
            # A table of its own for every device takes milliseconds each; only the indices are wanted.
            table = partitioner.dataset
            partitioner._dataset = Rows(np.asarray(table["index"][:]), table.unique("label"))
            parts = [partitioner.load_partition(device) for device in range(devices)]
        except ModuleNotFoundError:
            raise
        except Exception as error:  # whatever a partitioner refuses with, the user gets one sentence
            raise _refusal(settings.partition, len(rows), devices, error) from error
    return [np.sort(np.asarray(part, dtype=np.int64)) for part in parts]


def _refusal(name: str, samples: int, devices: int, error: Exception) -> FedsplitError:
    reason = str(error).split(". ")[0].strip().rstrip(".") or type(error).__name__
    mend = MENDS.get(name, "use fewer devices or another data.partition")
    return FedsplitError(
        f"data.partition='{name}' cannot deal {samples} samples to {devices} devices ({reason}): {mend}."
    )


def _check(
    parts: Sequence[Indices],
    labels: npt.NDArray[np.int64],
    test_labels: npt.NDArray[np.int64],
    classes: Sequence[str],
    settings: Data,
    least: int,
) -> None:
    sizes = [len(part) for part in parts]
    if min(sizes) < least:
        held = f" before {settings.local_test:g} of them are held out" if settings.local_test > 0 else ""
        mend = MENDS.get(settings.partition, "use fewer devices")
        raise FedsplitError(
            f"data.partition='{settings.partition}' gives device {int(np.argmin(sizes))} only {min(sizes)} samples, "
            f"and data.min-samples={settings.min_samples} asks for {least}{held}: {mend}, or lower data.min-samples."
        )
    lost = np.setdiff1d(test_labels, labels[np.concatenate(parts)])
    if len(lost) and not settings.allow_missing_classes:
        others = f" (and {len(lost) - 1} more classes)" if len(lost) > 1 else ""
        raise FedsplitError(
            f"No device holds class '{classes[lost[0]]}'{others} of the test set: use more devices, another "
            "data.partition or a larger data.limit, or set data.allow-missing-classes=true."
        )


def plot(parts: Sequence[Indices], labels: npt.NDArray[np.int64], classes: Sequence[str], path: str | Path) -> None:
    """Draw who holds what to `path`: samples a device and class, and samples a device.

    `parts` are index arrays into `labels` (S,). Darker is more, on a logarithmic scale that reads in
    grey and to colour-blind eyes; white is none.
    """
    from fedsplit.data.picture import draw

    draw(_counts(parts, labels, classes), classes, Path(path))


def table(parts: Sequence[Indices], labels: npt.NDArray[np.int64], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of partition.csv: how many samples of which class a device trains on; classes that it lacks are left out."""
    counts = _counts(parts, labels, classes)
    return [
        {"device": device, "class": classes[number], "samples": samples}
        for device, row in enumerate(counts.tolist())
        for number, samples in enumerate(row)
        if samples
    ]


def _counts(parts: Sequence[Indices], labels: npt.NDArray[np.int64], classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """Samples by device and class."""
    return np.stack([np.bincount(labels[part], minlength=len(classes)) for part in parts])
