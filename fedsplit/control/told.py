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
    from fedsplit.report import style

    table = [(int(row["round"]), float(row[column])) for row in rows]
    means: dict[int, list[float]] = {}
    for round, value in table:
        means.setdefault(round, []).append(value)
    picture = style.picture(7.0)
    axes: Any = picture.subplots()
    dots = {"ms": 4, "alpha": 0.5, "color": style.COLOURS[0]}
    axes.plot([round for round, _ in table], [value for _, value in table], "o", **dots)
    ordered = sorted(means)
    mean = [sum(means[round]) / len(means[round]) for round in ordered]
    axes.plot(ordered, mean, color=style.COLOURS[1], label="mean")
    style.dress(axes, x="round", y=label, whole="x")
    style.legend(axes)
    picture.save(path)
    return path
