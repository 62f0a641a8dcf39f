"""A folder of Parquet files: train.parquet, and test.parquet or its like."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsplit.data.raw import GROUPS, Raw, check_labels
from fedsplit.types import FedsplitError

TESTS = ("test.parquet", "val.parquet", "validation.parquet")
BATCH = 32


def files(folder: Path) -> tuple[Path, Path]:
    """The train and the test file of `folder`.

    Raises:
        FedsplitError: the folder or one of them is missing.
    """
    if not folder.is_dir():
        raise FedsplitError(
            f"data.source='{folder}' is no folder; give one that holds train.parquet and test.parquet, or 'digits'."
        )
    train = folder / "train.parquet"
    tests = [folder / name for name in TESTS if (folder / name).is_file()]
    if not train.is_file() or not tests:
        missing = "test.parquet (or val.parquet)" if train.is_file() else "train.parquet"
        raise FedsplitError(f"{folder} holds no {missing}; write it with the columns image ({{bytes}}) and label.")
    return train, tests[0]


def read(path: Path, names: tuple[str, ...] | None = None) -> Raw:
    """The split in the file `path`; `names` are the classes of its train set, None when it is that.

    Raises:
        FedsplitError: not a Parquet file, a missing or ill-typed column, or a bad label.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, pre_buffer=False)
        schema = file.schema_arrow
        _check_columns(schema, path)
        groups = next((name for name in GROUPS if name in schema.names), None)
        table = file.read(columns=["label", *([groups] if groups else [])])
    except (pa.ArrowException, OSError) as error:
        raise FedsplitError(f"{path} is not a readable Parquet file ({_first(error)}); write it anew.") from error
    labels = _column(table["label"], path, "label").astype(np.int64)
    classes = check_labels(labels, _names(schema) if names is None else names, str(path))
    members = _column(table[groups], path, groups).astype(np.str_) if groups else None
    return Raw(str(path), labels, members, classes, lambda count: islice(_blobs(path), count))


def _blobs(path: Path) -> Iterator[bytes | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Without pre-buffering, one row group is held at a time.
    file = pq.ParquetFile(path, pre_buffer=False)
    try:
        for batch in file.iter_batches(BATCH, columns=["image"]):
            yield from (image and image["bytes"] for image in batch.column(0).to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise FedsplitError(f"{path}: cannot read column image ({_first(error)}); write the file anew.") from error


def _check_columns(schema: Any, path: Path) -> None:
    import pyarrow as pa

    for name in ("image", "label"):
        if name not in schema.names:
            found = ", ".join(schema.names)
            raise FedsplitError(f"{path} has no column '{name}' (it has: {found}); rename or add it.")
    if not pa.types.is_integer(schema.field("label").type):
        raise FedsplitError(
            f"{path}: column label has type {schema.field('label').type}; store class numbers as integers from 0."
        )
    kind = schema.field("image").type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise FedsplitError(f"{path}: column image has type {kind}; store a struct with the encoded image in 'bytes'.")


def _column(column: Any, path: Path, name: str) -> npt.NDArray[Any]:
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise FedsplitError(f"{path}, row {row}: column {name} is empty; fill it or drop the row.")
    return np.asarray(column.to_pylist() if name != "label" else column.to_numpy())


def _names(schema: Any) -> tuple[str, ...]:
    """The class names of the Hugging Face metadata; empty when there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features["label"]["names"])
    except (KeyError, ValueError, TypeError):
        return ()


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
