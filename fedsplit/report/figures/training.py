"""What a run reached, and what it cost: accuracy against rounds, bytes, seconds and joules; bytes by stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsplit.report import style
from fedsplit.report.groups import Group, as_groups
from fedsplit.report.reading import Absent, Run

MOST_LINES = 21
MOST_MARKED = 40
CHARACTERS = 11  # of a legend, an inch
Floats = npt.NDArray[np.float64]
# What accuracy is drawn against: columns of rounds.csv that are summed, axis, divisor, why there may be none.
AGAINST: dict[str, tuple[tuple[str, ...], str, float, str]] = {
    "round": ((), "round", 1.0, ""),
    "bytes": (("bytes_up", "bytes_down"), "bytes on the wire, all clients, both ways (MB)", 1e6, "nothing was sent"),
    "virtual_s": (
        ("virtual_s",), "virtual time (s)", 1.0, "its devices are infinitely fast (devices.fleet, devices.flops-per-s)",
    ),
    "energy_j": (
        ("energy_j",), "energy of the devices (J)", 1.0, "its devices need no power (devices.fleet, devices.active-w)",
    ),
}  # fmt: skip
STREAMS = ("activations_up", "activations_down", "gradients_up", "gradients_down", "parameters_up", "parameters_down")


def accuracy(
    runs: Run | Group | Sequence[Run | Group], against: str = "round", width: float = style.HALF
) -> style.Picture:
    """Test accuracy (%) against "round", "bytes", "virtual_s" or "energy_j", sums over clients and rounds so far.

    Of several runs that differ only in their seed the line is the mean of the rounds that all have tested, at the
    mean of their costs, and the band goes from the lowest to the highest.

    Raises:
        Absent: no round was tested, or the runs do not have that cost.
    """
    columns, label, unit, reason = AGAINST[against]
    found = as_groups(runs)
    lines = [(group, line) for group in found if (line := _line(group, columns)) is not None]
    if not lines:
        raise Absent("No round was tested yet.")
    if columns and not any(line[0].any() for _, line in lines):
        raise Absent(f"There is none: {reason}.")
    made = style.picture(width, 3.5 + 0.2 * ((min(len(lines), MOST_LINES) - 1) // 2))
    axes: Any = made.subplots()
    for number, (group, (x, mean, low, high)) in enumerate(lines[:MOST_LINES]):
        wider = max(0, min(4, len(lines)) - 1 - number)  # lines that coincide are all seen
        how = style.look(number) | ({"marker": ""} if len(x) > MOST_MARKED else {})
        how |= {"linewidth": how["linewidth"] + wider, "markersize": how["markersize"] + wider}
        axes.plot(x / unit, 100 * mean, label=group.name, **how)
        if len(group.runs) > 1:
            axes.fill_between(x / unit, 100 * low, 100 * high, color=how["color"], alpha=0.18, linewidth=0)
    style.dress(axes, x=label, y="test accuracy (%)", whole="" if columns else "x")
    if len(lines) > 1 or len(lines[0][0].runs) > 1:
        style.legend(made, columns=_columns([group for group, _ in lines], width), loc="outside lower center")
    made.alt = f"Line plot of test accuracy in percent against {label}: " + "; ".join(
        f"{group.name} ends at {100 * line[1][-1]:.1f} %" for group, line in lines[:MOST_LINES]
    )
    if len(lines) > MOST_LINES:
        made.note = f"The first {MOST_LINES} of {len(lines)} groups are drawn."
    return made


def _columns(found: Sequence[Group], width: float) -> int:
    """Of a legend below a picture `width` inches wide."""
    longest = max(len(group.name) for group in found[:MOST_LINES])
    return 2 if len(found) > 2 and 2 * longest < CHARACTERS * width else 1


def _line(group: Group, columns: Sequence[str]) -> tuple[Floats, Floats, Floats, Floats] | None:
    """Mean cost, and mean, lowest and highest accuracy, of the rounds that all runs of a group have tested."""
    curves = []
    for run in group.runs:
        table = run.rounds
        tested = np.flatnonzero(np.isfinite(table.numbers("accuracy")))
        if not len(tested) or any(column not in table for column in columns):
            continue
        cost = np.cumsum(sum((table.numbers(column) for column in columns), np.zeros(table.count)))
        rounds = table.numbers("round")
        cost = cost if columns else rounds
        curves.append({int(rounds[at]): (cost[at], table.numbers("accuracy")[at]) for at in tested})
    if not curves:
        return None
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    if not shared:
        return None
    points = np.array([[curve[number] for number in shared] for curve in curves])
    right = points[:, :, 1]
    return points[:, :, 0].mean(axis=0), right.mean(axis=0), right.min(axis=0), right.max(axis=0)


def ledger(run: Run) -> style.Picture:
    """Bytes of the run by stream (MB), beside what they would be without codecs; and bytes a round by kind.

    Raises:
        Absent: nothing was sent yet.
    """
    table = run.ledger
    streams = [name for name in STREAMS if name in table]
    if not streams or not sum(table[name].sum() for name in streams):
        raise Absent("Nothing crossed the wire." if table else "There is no ledger.csv, or no round in it yet.")
    made = style.picture(style.WIDE, 3.6)
    left, right = made.subplots(1, 2, width_ratios=(3, 2))
    sent = [table.numbers(name).sum() / style.MEGA for name in streams]
    raw = [table.numbers(f"raw_{name}").sum() / style.MEGA for name in streams]
    coded = bool(np.isfinite(raw).all()) and any(abs(a - b) > 1e-9 for a, b in zip(raw, sent, strict=True))
    at = np.arange(len(streams))
    if coded:
        left.barh(at, raw, height=0.78, color=style.FAINT, label="without codecs")
    left.barh(at, sent, height=0.45 if coded else 0.7, color=_colours(streams), label="on the wire")
    for place, (value, whole) in enumerate(zip(sent, raw, strict=True)):
        text = f" {value:,.3g}" + (f" ({100 * value / whole:.0f} %)" if coded and whole else "")
        left.text(max(value, whole if coded else 0), place, text, va="center", fontsize=style.SMALL, color=style.INK)
    left.set_yticks(at, [name.replace("_", " ") for name in streams])
    left.invert_yaxis()
    left.margins(x=0.22)
    style.dress(left, "all rounds", x="bytes, all clients (MB)", grid="x")
    _kinds(right, run)
    if coded:
        style.legend(made, loc="outside lower left", handles=left.containers[:1])
    total = sum(sent)
    made.alt = f"Bars of bytes by stream, {total:,.4g} MB in all: " + ", ".join(
        f"{name.replace('_', ' ')} {value:,.3g} MB" for name, value in zip(streams, sent, strict=True)
    )
    return made


def _kinds(axes: Any, run: Run) -> None:
    """Bytes a round, stacked by what they are."""
    table = run.ledger
    rounds = table.numbers("round")
    below = np.zeros(table.count)
    for kind, colour in zip(("activations", "gradients", "parameters"), style.COLOURS, strict=False):
        here = sum((table.numbers(f"{kind}_{way}") for way in ("up", "down")), np.zeros(table.count)) / style.MEGA
        here = np.nan_to_num(here)
        edges = np.append(rounds - 0.5, rounds[-1] + 0.5)
        axes.stairs(below + here, edges, baseline=below, fill=True, color=colour, label=kind)
        below = below + here
    style.dress(axes, "by round", x="round", y="bytes (MB)", grid="y", whole="x")
    axes.margins(y=0.25)
    style.legend(axes, columns=3, loc="upper left", handlelength=1.0, columnspacing=1.0)


def _colours(streams: Sequence[str]) -> list[Any]:
    """Blue activations, orange gradients, green parameters; what goes down is lighter."""
    kinds = dict(zip(("activations", "gradients", "parameters"), style.COLOURS, strict=False))
    return [style.tint(kinds[name.split("_")[0]], 1.0 if name.endswith("up") else 0.6) for name in streams]


def compare(
    runs: Run | Group | Sequence[Run | Group], x: str = "bytes", y: str = "accuracy", width: float = style.HALF
) -> style.Picture:
    """One figure of the comparison table against another, a point a group; bars are one standard deviation.

    `x` and `y` are names of `fedsplit.report.groups.COMPARED`, such as "worst_ssim" and "accuracy".

    Raises:
        Absent: no group has both figures.
    """
    from fedsplit.report.groups import COMPARED

    units = {name: (f"{title} ({unit})" if unit else title, by) for name, title, unit, by in COMPARED}
    found = [(g, a, b) for g in as_groups(runs) if (a := g.figure(x)) and (b := g.figure(y))]
    if not found:
        raise Absent(f"No run has both figures, {units[x][0]} and {units[y][0]}.")
    made = style.picture(width, 3.6 + 0.2 * ((min(len(found), MOST_LINES) - 1) // 2))
    axes: Any = made.subplots()
    for number, (group, across, up) in enumerate(found[:MOST_LINES]):
        how = style.look(number) | {"linestyle": "", "markersize": 7}
        bars = {"xerr": (across[1] or 0) / units[x][1], "yerr": (up[1] or 0) / units[y][1], "capsize": 3}
        axes.errorbar(across[0] / units[x][1], up[0] / units[y][1], **bars, **how, label=group.name)
    style.dress(axes, x=units[x][0], y=units[y][0])
    axes.margins(0.12)
    style.legend(made, columns=_columns([group for group, *_ in found], width), loc="outside lower center")
    made.alt = f"Scatter plot of {units[y][0]} against {units[x][0]}, a point for each of {len(found)} groups"
    made.note = f"The first {MOST_LINES} of {len(found)} groups are drawn." if len(found) > MOST_LINES else ""
    return made
