"""A split as its source tells it: labels at once, encoded images when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedsplit.types import FedsplitError

GROUPS = ("group", "writer", "user", "group_id", "writer_id", "user_id")


@dataclass(frozen=True)
class Raw:
    """`labels` (S,) int64, `groups` (S,) or None, `classes`, and `blobs(n)`: the first n encoded images.

    `where` names the split in messages. `classes` counts the whole split, whatever is used of it.
    """

    where: str
    labels: npt.NDArray[np.int64]
    groups: npt.NDArray[np.str_] | None
    classes: tuple[str, ...]
    blobs: Callable[[int], Iterable[bytes | None]]


def check_labels(labels: npt.NDArray[np.int64], names: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The class names: `names` when given, else "0" to the largest label.

    Raises:
        FedsplitError: no rows, a negative label, one beyond `names`, or, without names, one that is
            no class number because it exceeds the number of rows.
    """
    if len(labels) == 0:
        raise FedsplitError(f"{where} holds no rows; write at least one image and label to it.")
    count = len(names) or max(1, min(int(labels.max()) + 1, len(labels)))
    wrong = np.flatnonzero((labels < 0) | (labels >= count))
    if len(wrong):
        row = int(wrong[0])
        raise FedsplitError(
            f"{where}, row {row}: label {labels[row]} is not a class number from 0 to {count - 1}; "
            "number the classes from 0, or drop the row."
        )
    return names or tuple(str(number) for number in range(count))


def missing_package(error: ModuleNotFoundError, what: str) -> FedsplitError:
    """The refusal of `what` where an optional package is not installed."""
    # A device reads its own data, and has nothing of a simulation.
    extra = "device" if (error.name or "").partition(".")[0] == "pyarrow" else "simulation"
    return FedsplitError(f"{what} needs the package '{error.name}': pip install 'fedsplit[{extra}]'.")
