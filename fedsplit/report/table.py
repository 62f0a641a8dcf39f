"""A CSV file by column, as a run or a study wrote it: nothing checks its columns against those of today."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsplit.types import FedsplitError

Column = npt.NDArray[Any]


class Table(Mapping[str, Column]):
    """A CSV file by column: numbers as numbers, an empty cell among them as NaN; text where a cell is no number.

    It is empty, and false, where there is no file. `count` is the number of rows.
    """

    def __init__(self, names: Sequence[str] = (), rows: Sequence[Sequence[str]] = ()) -> None:
        self.count = len(rows)
        self._text = dict(zip(names, zip(*rows, strict=True), strict=True)) if rows else {}
        self._made: dict[str, Column] = {}

    def __getitem__(self, name: str) -> Column:
        if name not in self._made:
            self._made[name] = _values(self._text[name])
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._text)

    def __len__(self) -> int:
        return len(self._text)

    def text(self, name: str) -> tuple[str, ...]:
        """The cells of a column as they stand in the file."""
        return tuple(self._text[name])

    def numbers(self, name: str) -> npt.NDArray[np.float64]:
        """A column as numbers, NaN for whatever is none and for a column that is not there."""
        if name not in self._text:
            return np.full(self.count, np.nan)
        values = self[name]
        return values.astype(float) if values.dtype.kind in "if" else np.array([_number(c) for c in self._text[name]])

    def rows(self) -> list[dict[str, Any]]:
        """A dictionary a row, for `pandas.DataFrame` and loops."""
        names = list(self)
        return [
            dict(zip(names, row, strict=True)) for row in zip(*(self[name].tolist() for name in names), strict=True)
        ]

    def of(self, name: str, value: str) -> Table:
        """The rows whose cell `name` is `value`."""
        kept = [number for number, cell in enumerate(self._text[name]) if cell == value]
        cells = list(zip(*self._text.values(), strict=True))
        return Table(list(self._text), [cells[number] for number in kept])


def read_table(file: Path) -> Table:
    """A CSV file; rows that a kill cut short are left out, and a file that is not there is an empty table."""
    try:
        with file.open(newline="", encoding="utf-8") as source:
            text = source.read()
    except FileNotFoundError:
        return Table()
    except (OSError, UnicodeDecodeError) as error:
        raise FedsplitError(f"Cannot read {file}: {error}.") from None
    whole = text[: text.rfind("\n") + 1]
    lines = list(csv.reader(io.StringIO(whole, newline="")))
    if not lines:
        return Table()
    names, rows = lines[0], lines[1:]
    return Table(names, [row for row in rows if len(row) == len(names)])


def _values(cells: Sequence[str]) -> Column:
    try:
        return np.array([int(cell) for cell in cells], dtype=np.int64)
    except (ValueError, OverflowError):
        pass
    try:
        return np.array([float(cell) if cell else np.nan for cell in cells])
    except ValueError:
        return np.array(cells, dtype=object)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")
