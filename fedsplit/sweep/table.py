"""The table of a sweep: a row a finished run, as CSV and Parquet, and its means over seeds."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsplit.sweep import folders
from fedsplit.sweep.study import Run
from fedsplit.types import FedsplitError

NAME = "sweep"
Row = dict[str, Any]
# Of the means: a figure, its title, what it is multiplied by, and whether it is left out where it is 0 everywhere.
SHOWN: tuple[tuple[str, str, float, bool], ...] = (
    ("accuracy", "accuracy (%)", 100.0, False),
    ("bytes", "wire (MB)", 1e-6, True),
    ("client_flops", "client GFLOPs", 1e-9, True),
    ("virtual_s", "virtual time (s)", 1.0, True),
    ("energy_j", "energy (J)", 1.0, True),
    ("worst_ssim", "worst SSIM", 1.0, True),
)


def row(run: Run, summary: Mapping[str, Any]) -> Row:
    """One row: the point, the seed, every figure of summary.json and of an audit, and the run's folder."""
    figures = {name: value for name, value in summary.items() if not isinstance(value, Mapping | list)}
    own = {**run.point, "seed": run.seed}
    audit = folders.worst(run.path) if attacked(run) else {}
    return {**own, **{n: v for n, v in figures.items() if n not in own}, **audit, "folder": str(run.path)}


def attacked(run: Run) -> bool:
    """Whether a run that is to be audited has been."""
    return bool(run.audit) and folders.audited(run.path, run.audit, run.audit_pairs)


def write(rows: Sequence[Row], out: Path) -> Path:
    """Write `sweep.csv` and `sweep.parquet` anew: the old table or the new one, never half of it; the first's path.

    Raises:
        FedsplitError: pyarrow is missing, or the folder cannot be written.
    """
    arrow, csv, parquet = _arrow()
    columns = list(dict.fromkeys(name for each in rows for name in each if name != "folder")) + ["folder"]
    made = arrow.table({name: _column(arrow, [each.get(name) for each in rows]) for name in columns})
    try:
        for suffix, save in (("parquet", parquet.write_table), ("csv", csv.write_csv)):
            scratch = out / f".{NAME}.{suffix}.new"
            save(made, str(scratch))
            os.replace(scratch, out / f"{NAME}.{suffix}")
    except OSError as error:
        raise FedsplitError(f"Cannot write the table of the sweep to {out}: {error}.") from None
    return out / f"{NAME}.csv"


def check() -> None:
    """Refuse an installation that could not write the table.

    Raises:
        FedsplitError: pyarrow is missing.
    """
    _arrow()


def means(rows: Iterable[Row], runs: Sequence[Run]) -> list[Row]:
    """A row a point, in the order of the study: its keys, `seeds`, and NAME_mean and NAME_std of every figure.

    The deviation is that of a sample (n - 1), None of one seed.
    """
    found: dict[tuple[Any, ...], list[Row]] = {tuple(run.point.values()): [] for run in runs}
    keys = list(runs[0].point)
    for each in rows:
        found[tuple(each[key] for key in keys)].append({**each, "bytes": each["bytes_up"] + each["bytes_down"]})
    return [_mean_row(dict(zip(keys, point, strict=True)), its) for point, its in found.items()]


def shown(points: Sequence[Row], keys: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The means as text: titles, and a line of cells a point."""
    columns = [
        (name, title, scale)
        for name, title, scale, hide in SHOWN
        if not hide or any(point.get(f"{name}_mean") for point in points)
    ]
    lines = []
    for point in points:
        cells = [with_spread(point.get(f"{n}_mean"), point.get(f"{n}_std"), s, form(n)) for n, _, s in columns]
        lines.append([*(str(point[key]) for key in keys), str(point["seeds"]), *cells])
    return [*keys, "seeds", *(title for _, title, _ in columns)], lines


def form(name: str) -> str:
    """How a figure's mean and deviation are written."""
    return "{:.3f}" if name == "worst_ssim" else "{:,.1f}" if name == "accuracy" else "{:,.4g}"


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return statistics.fmean(values) if values else None


def spread(values: Sequence[float]) -> float | None:
    """The sample standard deviation (n - 1); None of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def with_spread(value: float | None, std: float | None, scale: float, form: str) -> str:
    """`mean ± spread`; the mean alone of one seed, '-' of none."""
    if value is None:
        return "-"
    text = form.format(scale * value)
    return text if std is None else f"{text} ± {form.replace('+', '').format(scale * std)}"


def _mean_row(point: Row, rows: Sequence[Row]) -> Row:
    made: Row = {**point, "seeds": len(rows)}
    for name in dict.fromkeys(name for each in rows for name in each if name not in point and name != "seed"):
        values = [each[name] for each in rows if type(each.get(name)) in (int, float)]
        if values:
            made |= {f"{name}_mean": mean(values), f"{name}_std": spread(values)}
    return made


def _column(arrow: Any, values: list[Any]) -> Any:
    """An array of one type: whole numbers where all are, else numbers; numbers where there is nothing."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and kinds != {int}:
        return arrow.array([None if value is None else float(value) for value in values], arrow.float64())
    return arrow.array(values)


def _arrow() -> tuple[Any, Any, Any]:
    try:
        import pyarrow
        from pyarrow import csv, parquet
    except ImportError:
        raise FedsplitError("The table of a sweep needs pyarrow: pip install 'fedsplit[simulation]'.") from None
    return pyarrow, csv, parquet
