"""A data set of the Hugging Face hub, or of its local cache."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fedsplit.data.raw import GROUPS, Raw, check_labels
from fedsplit.types import FedsplitError

TESTS = ("test", "validation", "valid", "val")
PATIENCE_S = 5.0


def read(name: str) -> tuple[Raw, Raw]:
    """The train and the test split of data set `name`; image and label columns are found by type.

    Raises:
        FedsplitError: the data set cannot be fetched, lacks a split or a column, or has a bad label.
    """
    splits = _fetch(name)
    test = next((split for split in TESTS if split in splits), None)
    if "train" not in splits or test is None:
        raise FedsplitError(
            f"Data set '{name}' has the splits {', '.join(splits)}, but needs train and test (or validation); "
            "write the split you want to a folder with train.parquet and test.parquet."
        )
    train = _raw(splits["train"], f"{name}, split train", None)
    return train, _raw(splits[test], f"{name}, split {test}", train.classes)


def _fetch(name: str) -> Any:
    reachable = _reachable()
    import datasets

    mend = "use data.source=digits, or a folder with train.parquet and test.parquet"
    try:
        with nullcontext() if reachable else _offline():
            return datasets.load_dataset(name)
    except Exception as error:  # the hub's client raises a dozen kinds
        if not reachable:
            why = "HF_HUB_OFFLINE is set" if _told_offline() else "the Hugging Face hub cannot be reached"
            raise FedsplitError(
                f"data.source='{name}' is neither a folder here nor in the local Hugging Face cache, and {why}: "
                f"{mend}, or fetch it once while online."
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise FedsplitError(
            f"Cannot load data set '{name}' from the hub ({reason}): check the name, or {mend}."
        ) from error


def _told_offline() -> bool:
    told = (os.environ.get(name, "").upper() for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    return any(value in {"1", "ON", "YES", "TRUE"} for value in told)


def _reachable() -> bool:
    """Whether the hub answers within seconds; `datasets` itself would retry for half a minute or more."""
    if _told_offline():
        return False
    answered = threading.Event()

    def ask() -> None:
        try:
            from huggingface_hub import constants, get_session

            get_session().head(constants.ENDPOINT, timeout=PATIENCE_S)
            answered.set()
        except Exception:  # any failure means the same here
            return

    # A thread, because a name look-up knows no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return answered.is_set()


@contextmanager
def _offline() -> Iterator[None]:
    """Let `datasets` look into its local cache only."""
    import datasets.config
    import huggingface_hub.constants

    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before


def _raw(split: Any, where: str, names: tuple[str, ...] | None) -> Raw:
    import datasets

    image = _of_type(split, datasets.Image, "image", where)
    label = _of_type(split, datasets.ClassLabel, "label", where)
    found = split.with_format("arrow")[label][:].to_pylist()
    if None in found:
        raise FedsplitError(f"{where}, row {found.index(None)}: column {label} is empty; use a labelled split.")
    labels = np.asarray(found, dtype=np.int64)
    classes = check_labels(labels, tuple(split.features[label].names) if names is None else names, where)
    group = next((column for column in GROUPS if column in split.features), None)
    groups = np.asarray([str(value) for value in split[group][:]]) if group else None
    encoded = split.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return Raw(where, labels, groups, classes, lambda count: islice(_blobs(encoded, image), count))


def _blobs(encoded: Any, image: str) -> Iterator[bytes | None]:
    for row in encoded:
        cell = row[image]
        if cell and cell["bytes"] is None and cell["path"]:
            yield Path(cell["path"]).read_bytes()
        else:
            yield cell and cell["bytes"]


def _of_type(split: Any, kind: type, favourite: str, where: str) -> str:
    columns = [column for column, feature in split.features.items() if isinstance(feature, kind)]
    if not columns:
        raise FedsplitError(
            f"{where} has no {kind.__name__} column (it has: {', '.join(split.features)}); "
            "use another data set, or write it to a folder with the columns image and label."
        )
    return favourite if favourite in columns else columns[0]
