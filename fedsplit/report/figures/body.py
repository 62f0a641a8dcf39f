"""What of the model ran, and what the controllers chose."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedsplit.report import style
from fedsplit.report.reading import Absent, Run
from fedsplit.report.table import Table

MOST_PANELS = 4
MOST_LINES = 7
MOST_TEXTS = 12
# Columns of choices.csv that say whose a row is, or that are drawn otherwise.
PLACES = ("controller", "round", "group", "client", "explored")
LABELS = {
    "rate": "dropped blocks\n(fraction)",
    "gain": "accuracy gain\n(fraction)",
    "reward": "reward (accuracy\ngain per virtual s)",
    "seconds": "duration\n(virtual s)",
    "keep": "keep (fraction)",
    "batch": "batch (samples)",
    "predicted_s": "predicted time\n(virtual s)",
    "uplink": "uplink (bytes/s)",
}


def plans(run: Run) -> style.Picture:
    """Which heads and MLP units ran: the share of steps in which a unit trained in full, by block and unit, and by
    round and block; with the share that ran forward only, where any did.

    Raises:
        Absent: all units always ran, or no round is over.
    """
    table = run.units
    if not table:
        planned = run.config.get("body.plans")
        why = "no round is over yet" if planned else "no plan was set (body.plans), so all units ran"
        raise Absent(f"There is no units.csv: {why}.")
    block, unit, number = (table.numbers(name).astype(int) for name in ("block", "unit", "round"))
    steps = {name: table.numbers(name) for name in ("full", "forward", "skip")}
    total = sum(steps.values(), np.zeros(table.count))
    panels = [("full", "trained (share of steps)")]
    if steps["forward"].sum():
        panels.append(("forward", "forward only (share of steps)"))
    made = style.picture(style.WIDE, (1.3 + 0.27 * (block.max() + 1)) * len(panels))
    grid = made.subplots(len(panels), 2, squeeze=False)
    rounds = sorted(set(number))
    at = np.searchsorted(rounds, number)
    for (left, right), (name, label) in zip(grid, panels, strict=True):
        style.heat(left, _share(block, unit, steps[name], total), label)
        style.dress(left, x="unit (head with its MLP share)", y="block", grid="")
        style.ticks(left, range(unit.max() + 1), "x", 16)
        style.heat(right, _share(block, at, steps[name], total), label)
        style.dress(right, x="round", y="block", grid="")
        style.ticks(right, rounds, "x", 16)
        for axes in (left, right):
            style.ticks(axes, range(block.max() + 1), "y")
    ran = steps["full"].sum() / max(1.0, total.sum())
    made.alt = f"Heat maps of the share of steps in which units of each block trained, {100 * ran:.0f} % over all"
    return made


def _share(down: Any, across: Any, part: Any, total: Any) -> Any:
    shape = (int(down.max()) + 1, int(across.max()) + 1)
    sums = [np.zeros(shape), np.zeros(shape)]
    for made, values in zip(sums, (part, total), strict=True):
        np.add.at(made, (down, across), values)
    with np.errstate(invalid="ignore"):
        return sums[0] / np.where(sums[1] > 0, sums[1], np.nan)


def choices(run: Run, controller: str = "") -> style.Picture:
    """What a controller chose over rounds, a panel a column of choices.csv; `controller` is the first if left out.

    Groups have a line each; of clients every choice is a dot, the line their mean. A hollow marker was explored.

    Raises:
        Absent: no controller, or no round is over.
    """
    table = run.choices
    if not table:
        why = "no round is over yet" if run.config.get("control.tune") else "no controller was set (control.tune)"
        raise Absent(f"There is no choices.csv: {why}.")
    if "controller" in table:
        name = controller or table.text("controller")[0]
        if name not in table.text("controller"):
            raise Absent(f"There is no controller '{name}' in choices.csv.")
        table = table.of("controller", name)
    columns = [column for column in table if column not in PLACES and _says(table, column)][:MOST_PANELS]
    if not columns:
        raise Absent("Its controllers chose nothing that can be drawn.")
    made = style.picture(style.WIDE, 0.9 + 1.75 * len(columns))
    panels = made.subplots(len(columns), 1, sharex=True, squeeze=False)[:, 0]
    for axes, column in zip(panels, columns, strict=True):
        _panel(axes, table, column)
        style.dress(axes, y=LABELS.get(column, column), x="round" if axes is panels[-1] else "", whole="x")
    handles, labels = panels[0].get_legend_handles_labels()
    if labels:
        style.legend(made, min(8, len(labels)), loc="outside upper center", handles=handles)
    made.alt = f"Choices over rounds of {', '.join(LABELS.get(column, column) for column in columns)}".replace(
        "\n", " "
    )
    return made


def _says(table: Table, column: str) -> bool:
    """Whether a column is worth a panel: numbers, or a few words of which more than one was chosen."""
    words = set(table.text(column))
    return any(words) and (table[column].dtype != object or 1 < len(words) <= MOST_TEXTS)


def _panel(axes: Any, table: Table, column: str) -> None:
    number, values = table.numbers("round"), table[column]
    if values.dtype == object:
        names = sorted({cell for cell in table.text(column) if cell})
        values = np.array([names.index(cell) if cell else np.nan for cell in table.text(column)], dtype=float)
        axes.set_yticks(range(len(names)), [name if len(name) < 32 else f"{name[:31]}…" for name in names])
        axes.set_ylim(-0.5, len(names) - 0.5)
    explored = np.array([cell == "True" for cell in table.text("explored")] if "explored" in table else [])
    if "group" in table and any(table.text("group")):
        group = table.numbers("group")
        every = sorted({int(g) for g in group if np.isfinite(g)})
        for place, each in enumerate(every[:MOST_LINES]):
            mine, look = group == each, style.look(place)
            shift = 0.3 * (place - (min(len(every), MOST_LINES) - 1) / 2) / len(every)  # equal choices would hide
            axes.plot(number[mine] + shift, values[mine], **{**look, "linewidth": 1.0}, label=f"group {each}")
            if len(explored):
                tried = mine & explored
                axes.plot(
                    number[tried] + shift, values[tried], **{**look, "linestyle": "", "mfc": "white"},
                    label="hollow: explored" if place == 0 else "",
                )  # fmt: skip
        return
    axes.plot(number, values, "o", color=style.COLOURS[0], ms=4, alpha=0.4, label="a client", mew=0)
    if table[column].dtype != object:
        rounds = sorted(set(number[np.isfinite(values)]))
        means = [np.nanmean(values[number == each]) for each in rounds]
        axes.plot(rounds, means, color=style.COLOURS[1], linewidth=1.8, label="mean")
