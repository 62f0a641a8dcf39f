"""Where images come from: scikit-learn's digits, a folder of Parquet files, the Hugging Face hub.

Decoded pixels are cached, memory-mapped and read-only, under a name that says what decides them:
a file's path, time and size, the image size, the limits. A hub data set goes by its name: once
decoded it needs no hub; delete the cache folder to fetch it anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsplit import rng
from fedsplit.data import decode, hub, parquet, store
from fedsplit.data.raw import Raw, missing_package
from fedsplit.settings import Data
from fedsplit.types import DataSet, FedsplitError, Images

log = logging.getLogger(__name__)
DIGITS_TRAIN = 1200


def load(settings: Data, image_size: int, hollow: bool = False) -> DataSet:
    """The image set `settings.source`: `pixels` (S, image_size, image_size, 3) uint8 RGB, `labels` (S,).

    `settings.classes` leaves the first so many classes; `settings.limit` and `settings.test_limit` then take a
    prefix, and the classes are those of the whole of it.
    A `hollow` one decodes no picture: labels and groups are true, pixels are zeros that take no memory.

    Raises:
        FedsplitError: a source, file, column or row that cannot be used, and how to mend it.
    """
    try:
        return _load(settings, image_size, hollow)
    except ModuleNotFoundError as error:
        raise missing_package(error, f"data.source='{settings.source}'") from error


def own_pictures(settings: Data, folder: Path, image_size: int, classes: tuple[str, ...]) -> DataSet:
    """A device's own train.parquet in `folder`, with labels of these `classes`; there is no test set.

    Raises:
        FedsplitError: as `load`.
    """
    file = folder / "train.parquet"
    if not file.is_file():
        raise FedsplitError(f"{folder} holds no train.parquet; write it with the columns image ({{bytes}}) and label.")
    try:
        mark = (*_mark(file), classes)
        train, _ = _split(settings, mark, settings.limit, image_size, False, lambda: parquet.read(file, classes))
    except ModuleNotFoundError as error:
        raise missing_package(error, f"the device's data in {folder}") from error
    return DataSet(folder.name, train, Images(train.pixels[:0], train.labels[:0]), classes)


def _load(settings: Data, image_size: int, hollow: bool) -> DataSet:
    if settings.source == "digits":
        return _digits(settings, image_size, hollow)
    path = Path(settings.source).expanduser()
    if path.exists() or settings.source.startswith(("/", ".", "~")):
        return _folder(settings, path.resolve(), image_size, hollow)
    return _hub(settings, image_size, hollow)


def _digits(settings: Data, size: int, hollow: bool) -> DataSet:
    """scikit-learn's 1,797 digits of 8 x 8 pixels: a fixed stratified split, 1,200 train and 597 test.

    Both parts are in a fixed shuffled order that depends on no library's random generator, so a
    prefix is a fair sample.
    """
    from PIL import Image

    values, labels = _digits_of_sklearn()
    order = np.asarray(sorted(range(len(labels)), key=lambda row: rng.key(0, "digits", row)))
    # Position within the class, as a share of it: the smallest shares are a stratified sample.
    share = np.empty(len(labels))
    for digit in range(10):
        members = order[labels[order] == digit]
        share[members] = (np.arange(len(members)) + 0.5) / len(members)
    first = np.zeros(len(labels), dtype=bool)
    first[order[np.argsort(share[order], kind="stable")[:DIGITS_TRAIN]]] = True
    classes = _first(tuple(str(digit) for digit in range(10)), settings)

    def part(mask: npt.NDArray[np.bool_], limit: int) -> Images:
        rows = order[mask[order] & (labels[order] < len(classes))][: limit or None]
        if hollow:
            return Images(_blank(len(rows), size), labels[rows])
        grey = np.round(values[rows] * (255 / 16)).astype(np.uint8)
        pixels = np.empty((len(rows), size, size, 3), np.uint8)
        for slot, image in enumerate(grey):
            pixels[slot] = decode.scaled(Image.fromarray(image), size, settings.resize, "digits")
        pixels.setflags(write=False)
        return Images(pixels, labels[rows])

    return DataSet("digits", part(first, settings.limit), part(~first, settings.test_limit), classes)


def _digits_of_sklearn() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Grey values from 0 to 16, (1797, 8, 8), and labels, (1797,), as `sklearn.datasets.load_digits` gives them.

    From the file that it reads, where that is found: its import takes seconds, in every process.
    """
    package = find_spec("sklearn")
    for folder in (package.submodule_search_locations or ()) if package else ():
        file = Path(folder, "datasets", "data", "digits.csv.gz")
        if file.is_file():
            table = np.loadtxt(file, delimiter=",")
            return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images, found.target.astype(np.int64)


def _folder(settings: Data, path: Path, size: int, hollow: bool) -> DataSet:
    if path.is_file():
        raise FedsplitError(
            f"data.source='{path}' is a file; give the folder that holds it, with train.parquet and test.parquet."
        )
    train_file, test_file = parquet.files(path)
    train, classes = _split(settings, _mark(train_file), settings.limit, size, hollow, lambda: parquet.read(train_file))
    mark = (*_mark(test_file), classes)
    test, _ = _split(settings, mark, settings.test_limit, size, hollow, lambda: parquet.read(test_file, classes))
    return DataSet(path.name, train, test, _first(classes, settings))


def _hub(settings: Data, size: int, hollow: bool) -> DataSet:
    fetched: list[tuple[Raw, Raw]] = []

    def read(which: int) -> Raw:
        if not fetched:
            fetched.append(hub.read(settings.source))
        return fetched[0][which]

    train, classes = _split(settings, ("hub", settings.source, "train"), settings.limit, size, hollow, lambda: read(0))
    test, _ = _split(settings, ("hub", settings.source, "test"), settings.test_limit, size, hollow, lambda: read(1))
    return DataSet(settings.source, train, test, _first(classes, settings))


def _first(classes: tuple[str, ...], settings: Data) -> tuple[str, ...]:
    """The classes that `settings.classes` leaves."""
    if settings.classes > len(classes):
        raise FedsplitError(
            f"data.classes={settings.classes}, but '{settings.source}' has {len(classes)}; lower it, or set 0 for all."
        )
    return classes[: settings.classes or None]


def _mark(file: Path) -> tuple[str, int, int]:
    """What tells one state of a file from another."""
    state = file.stat()
    return str(file), state.st_mtime_ns, state.st_size


def _split(
    settings: Data, mark: tuple[Any, ...], limit: int, size: int, hollow: bool, read: Callable[[], Raw]
) -> tuple[Images, tuple[str, ...]]:
    """One split and the classes of its source; `read` is called only when the cache does not hold it."""
    folder = store.folder(settings.cache)
    name = store.digest("images-1", *mark, limit, size, settings.resize, *filter(None, [settings.classes]))
    arrays, pixels = (folder / f"{name}.npz", folder / f"{name}.npy") if folder else (None, None)
    if arrays and pixels and (kept := _from_cache(arrays, pixels, size)):
        return kept
    raw = read()
    wanted = raw.labels < (settings.classes or len(raw.classes))
    rows = np.flatnonzero(wanted)[: limit or None]
    count, labels = len(rows), raw.labels[rows]
    groups = None if raw.groups is None else raw.groups[rows]
    if hollow:
        return Images(_blank(count, size), labels, groups), raw.classes
    log.info("decoding %d images of %s to %d x %d pixels, once", count, raw.where, size, size)

    def decoded() -> Iterator[npt.NDArray[np.uint8]]:
        blobs = enumerate(raw.blobs(int(rows[-1]) + 1 if count else 0))
        return decode.chunks(compress(blobs, wanted), size, settings.resize, raw.where)

    shape = (count, size, size, 3)
    if arrays and pixels and store.save_stream(pixels, shape, decoded()):
        more = {} if groups is None else {"groups": groups}
        store.save_arrays(arrays, labels=labels, classes=np.asarray(raw.classes), **more)
        if kept := _from_cache(arrays, pixels, size):
            return kept
    return Images(_in_memory(shape, decoded()), labels, groups), raw.classes


def _from_cache(arrays: Path, pixels: Path, size: int) -> tuple[Images, tuple[str, ...]] | None:
    meta = store.load_arrays(arrays)
    found = store.load_stream(pixels, (size, size, 3))
    if meta is None or found is None or not {"labels", "classes"} <= meta.keys() or len(meta["labels"]) != len(found):
        return None
    classes = tuple(str(name) for name in meta["classes"])
    return Images(found, meta["labels"], meta.get("groups")), classes


def _blank(count: int, size: int) -> npt.NDArray[np.uint8]:
    return np.broadcast_to(np.zeros((), np.uint8), (count, size, size, 3))


def _in_memory(shape: tuple[int, ...], chunks: Iterable[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    made = np.empty(shape, np.uint8)
    start = 0
    for chunk in chunks:
        made[start : start + len(chunk)] = chunk
        start += len(chunk)
    made.setflags(write=False)
    return made
