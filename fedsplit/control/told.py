"""What a controller that chooses client by client says of a round: rows of choices.csv, and their plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

TOLD = "told"


def told(memory: Mapping[str, Any], round: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`memory` with what was chosen in round `round`, a row a client; what it said of an earlier one is dropped."""
    return {**memory, TOLD: [{"round": round, **row} for row in rows]}


def rows_of(memory: Mapping[str, Any], round: int) -> list[dict[str, Any]]:
    """The rows of `round` in `memory`."""
    return [dict(row) for row in memory.get(TOLD, []) if row["round"] == round]


def scatter(rows: Iterable[Mapping[str, Any]], column: str, label: str, path: Path) -> Path:
    """Plot one column of choices.csv (text or values) over rounds: a dot a client, a line for their mean."""
    from matplotlib.figure import Figure

    table = [(int(row["round"]), float(row[column])) for row in rows]
    means: dict[int, list[float]] = {}
    for round, value in table:
        means.setdefault(round, []).append(value)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes: Any = figure.subplots()
    axes.plot([round for round, _ in table], [value for _, value in table], "o", ms=4, alpha=0.5, color="#0072B2")
    ordered = sorted(means)
    axes.plot(ordered, [sum(means[round]) / len(means[round]) for round in ordered], color="#D55E00", label="mean")
    axes.set(xlabel="round", ylabel=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    return path
