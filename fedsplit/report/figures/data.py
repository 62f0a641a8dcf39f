"""Who holds what, and how well each class and each client is served."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedsplit.data import picture as partition_picture
from fedsplit.report import style
from fedsplit.report.reading import Absent, Run

READABLE = 30
MOST_BARS = 60


def partition(run: Run) -> style.Picture:
    """Who holds what: samples a device and class, on a logarithmic scale, and samples a device.

    Raises:
        Absent: an earlier version wrote no partition.csv.
    """
    table = run.partition
    if not table:
        raise Absent("There is no partition.csv: an earlier version wrote a picture alone.")
    device, samples = table.numbers("device").astype(int), table.numbers("samples").astype(int)
    names = _class_names(run, table.text("class"))
    places = {name: place for place, name in enumerate(names)}
    counts = np.zeros((device.max() + 1, len(names)), dtype=np.int64)
    counts[device, [places[name] for name in table.text("class")]] = samples
    made = partition_picture.figure(counts, names)
    per_device = counts.sum(axis=1)
    made.alt = (
        f"Heat map of samples by device ({len(counts)}) and class ({len(names)}); "
        f"devices hold {per_device.min()} to {per_device.max()} samples"
    )
    return made


def classes(run: Run) -> style.Picture:
    """Test accuracy of every class over rounds, and at the end, with that of all.

    Raises:
        Absent: no round was tested.
    """
    table = run.classes
    if not table:
        raise Absent("There is no classes.csv: no round was tested yet.")
    number = table.numbers("round").astype(int)
    names = list(dict.fromkeys(table.text("class")))
    places = {name: place for place, name in enumerate(names)}
    rounds = sorted(set(number))
    right = np.full((len(names), len(rounds)), np.nan)
    at = [places[name] for name in table.text("class")]
    right[at, np.searchsorted(rounds, number)] = table.numbers("accuracy")
    made = style.picture(style.WIDE, float(np.clip(1.3 + 0.26 * len(names), 3.0, 9.0)))
    grid, bars = made.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    style.heat(grid, 100 * right, "accuracy (%)", high=100.0)
    style.dress(grid, "over rounds", x="round", y="class", grid="")
    style.ticks(grid, rounds, "x", 16)
    last = 100 * np.nan_to_num(right[:, -1])
    style.bars(bars, last, style.tint(style.COLOURS[0], 0.75))
    whole = run.figure("accuracy")
    if whole is not None:
        bars.axvline(100 * whole, color=style.COLOURS[1], linewidth=1.8, label=f"all classes, {100 * whole:.1f} %")
        style.legend(made, loc="outside upper right")
    style.dress(bars, f"round {rounds[-1]}", x="accuracy (%)", grid="x")
    style.ticks(grid, names, "y", READABLE)
    bars.set_xlim(0, 100)
    worst, best = int(np.argmin(last)), int(np.argmax(last))
    made.alt = (
        f"Accuracy by class: best {names[best]} with {last[best]:.0f} %, worst {names[worst]} with {last[worst]:.0f} %"
    )
    return made


def personal(run: Run) -> style.Picture:
    """Accuracy of every client on its own held-out samples: of its own model at the end, sorted; of many a histogram.

    Raises:
        Absent: clients were not tested.
    """
    found, what = _personal(run)
    if not found:
        raise Absent("Clients were not tested on samples of their own (eval.per-client with data.local-test).")
    ordered = sorted(found, key=lambda client: (found[client], client))
    values = 100 * np.array([found[client] for client in ordered])
    made = style.picture(style.WIDE, 3.4)
    axes: Any = made.subplots()
    mean = values.mean()
    if len(ordered) > MOST_BARS:
        axes.hist(values, bins=np.linspace(0, 100, 41).tolist(), color=style.tint(style.COLOURS[0], 0.75))
        axes.axvline(mean, color=style.COLOURS[1], label=f"mean, {mean:.1f} %")
        style.dress(axes, x=f"accuracy of {what} (%)", y="clients", grid="y", whole="y")
    else:
        axes.bar(range(len(ordered)), values, width=0.75, color=style.tint(style.COLOURS[0], 0.75))
        axes.axhline(mean, color=style.COLOURS[1], label=f"mean, {mean:.1f} %")
        style.dress(axes, x="client, worst first", y=f"accuracy of\n{what} (%)", grid="y")
        axes.set_xticks(range(len(ordered)), [str(client) for client in ordered])
        axes.set_ylim(0, 100)
    style.legend(made, loc="outside upper right")
    made.alt = f"Accuracy by client, {values.min():.0f} to {values.max():.0f} %, mean {mean:.1f} %"
    return made


def _personal(run: Run) -> tuple[dict[int, float], str]:
    """Accuracy by client: of personal.csv, or of the last round in which each took part."""
    table, what, column = run.personal, "its own model at the end", "accuracy"
    if not table:
        table, what, column = run.clients, "its model after its last round", "personal_accuracy"
    if not table or column not in table:
        return {}, what
    cells = zip(table.numbers("client"), table.numbers(column), strict=True)
    return {int(client): float(value) for client, value in cells if np.isfinite(value)}, what


def _class_names(run: Run, held: tuple[str, ...]) -> list[str]:
    """Classes in the data set's order, which classes.csv has; before the first test, in that of their names."""
    known = list(dict.fromkeys(run.classes.text("class"))) if run.classes else []
    rest = {name for name in held if name not in known}
    return known + sorted(rest, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))
