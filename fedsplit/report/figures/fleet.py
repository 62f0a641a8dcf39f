"""Who trained when on the virtual clock, and what clients of each kind spend their time on."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedsplit.report import style
from fedsplit.report.reading import Absent, Run
from fedsplit.report.table import Table

MOST_CLIENTS, MOST_ROUNDS, LEAST_ROUNDS, MOST_KINDS = 40, 12, 3, 7
# How the phases of clients.csv are drawn: name, columns, how much of the profile's colour; None is grey.
PARTS = (
    ("receives", ("download_s",), 0.45),
    ("computes", ("compute_s",), 1.0),
    ("sends, latency", ("upload_s", "latency_s"), 0.45),
    ("waits for the server", ("server_s", "queue_s"), None),
    ("waits for the round's end", ("idle_s",), None),
)
WAITING = {"waits for the server": "#8d969f", "waits for the round's end": "#e4e8eb"}
NO_CLOCK = "The virtual clock stands still: the devices are infinitely fast (devices.fleet, devices.flops-per-s)."


def gantt(run: Run, rounds: int = MOST_ROUNDS, clients: int = MOST_CLIENTS) -> style.Picture:
    """Who trained when: a line a client, virtual seconds across, a bar a round, coloured by device profile.

    The phases of a client's round are drawn one after another, though they alternate step by step.

    Raises:
        Absent: the virtual clock stands still, or an earlier version did not write when clients began.
    """
    table = _clocked(run)
    begins = _begins(run, table)
    number, client = table.numbers("round"), table.numbers("client")
    first = number <= _last(number, client, rounds, clients)
    everyone = sorted({int(c) for c in client[first]})
    shown = everyone[:clients]
    kinds = _kinds(table)
    made = style.picture(style.WIDE, min(11.0, 1.9 + 0.24 * len(shown)))
    axes: Any = made.subplots()
    lanes = {device: lane for lane, device in enumerate(shown)}
    rows = [int(at) for at in np.flatnonzero(first & np.isfinite(begins)) if int(client[at]) in lanes]
    _bars(axes, table, rows, begins, lanes, kinds)
    lost = [at for at in rows if table.text("failure")[at] or _cell(table, "late", at)] if "failure" in table else []
    ends = begins + _spent(table, [name for _, names, _ in PARTS[:-1] for name in names])
    axes.plot([ends[at] for at in lost], [lanes[int(client[at])] for at in lost], "x", color="black", ms=5, zorder=3)
    _edges(axes, run, number[first].max())
    axes.set_yticks(range(len(shown)), [f"{device}" for device in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    style.dress(axes, x="virtual time (s)", y="client", grid="x")
    _legend(made, kinds, bool(lost))
    made.note = _left_out(len(shown), len(everyone), int(number[first].max()), int(number.max()))
    made.alt = (
        f"Gantt chart of {len(shown)} clients over {ends[rows].max() if rows else 0:,.3g} virtual seconds; "
        f"profiles: {', '.join(kinds)}"
    )
    return made


def phases(run: Run) -> style.Picture:
    """What a client's round takes by device profile: mean virtual seconds by phase, and mean joules.

    Raises:
        Absent: the virtual clock stands still.
    """
    table = _clocked(run)
    kinds = _kinds(table)
    mine = np.array(table.text("profile")) if "profile" in table else np.full(table.count, "device")
    made = style.picture(style.WIDE, 1.9 + 0.42 * len(kinds))
    left, right = made.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    at = np.arange(len(kinds))
    done = np.zeros(len(kinds))
    for name, columns, share in PARTS:
        spent = _spent(table, columns)
        means = np.array([np.mean(spent[mine == kind]) for kind in kinds])
        colours = [WAITING[name] if share is None else style.tint(c, share) for c in kinds.values()]
        left.barh(at, means, left=done, height=0.7, color=colours, edgecolor="white", linewidth=0.4)
        done = done + means
    joules = np.nan_to_num(table.numbers("energy_j"))
    right.barh(at, [np.mean(joules[mine == kind]) for kind in kinds], height=0.7, color=list(kinds.values()))
    counts = [len({c for c, k in zip(table.text("client"), mine, strict=True) if k == kind}) for kind in kinds]
    left.set_yticks(at, [f"{kind} ({count})" for kind, count in zip(kinds, counts, strict=True)])
    left.invert_yaxis()
    style.dress(left, x="virtual time of a client and round (s, mean)", grid="x")
    style.dress(right, x="energy (J, mean)", grid="x")
    _legend(made, {"full colour: computes": "#52606d"}, False)
    made.alt = "Stacked bars of mean seconds by phase: " + "; ".join(
        f"{kind} {total:,.3g} s a round" for kind, total in zip(kinds, done, strict=True)
    )
    return made


def _last(number: Any, client: Any, rounds: int, clients: int) -> float:
    """The last round that is drawn: fewer where other clients take part in every one, but not under three."""
    seen: set[float] = set()
    every = sorted(set(number))[: max(1, rounds)]
    for count, each in enumerate(every):
        seen |= set(client[number == each])
        if count >= LEAST_ROUNDS and len(seen) > clients:
            return float(every[count - 1])
    return float(every[-1])


def _clocked(run: Run) -> Table:
    table = run.clients
    if not table:
        raise Absent("There is no clients.csv, or no client in it yet.")
    if not np.nansum(table.numbers("virtual_s")):
        raise Absent(NO_CLOCK)
    if "compute_s" not in table:
        raise Absent("Its clients.csv, of an earlier version, does not say what clients spent their time on.")
    return table


def _begins(run: Run, table: Table) -> Any:
    """When each client's round began; of an earlier version, when the round did, where all begin together."""
    if "begins_s" in table:
        return table.numbers("begins_s")
    if run.config.get("server.schedule", "splitfed-v1") != "splitfed-v1":
        raise Absent("Its clients.csv, of an earlier version, does not say when clients that take turns began.")
    lasts, waited = run.rounds.numbers("virtual_s"), np.nan_to_num(run.rounds.numbers("waited_s"))
    starts = dict(zip(run.rounds.numbers("round"), np.cumsum(lasts) - lasts + waited, strict=True))
    return np.array([starts.get(number, np.nan) for number in table.numbers("round")])


def _spent(table: Table, columns: Any) -> Any:
    return sum((np.nan_to_num(table.numbers(name)) for name in columns), np.zeros(table.count))


def _kinds(table: Table) -> dict[str, str]:
    """The profiles and their colours; those beyond the palette share its last."""
    names = sorted({name for name in table.text("profile") if name}) if "profile" in table else ["device"]
    return {name: style.COLOURS[min(place, MOST_KINDS - 1)] for place, name in enumerate(names)}


def _bars(axes: Any, table: Table, rows: list[int], begins: Any, lanes: dict[int, int], kinds: dict[str, str]) -> None:
    """All bars of a look in one collection: a bar at a time would take a second for a hundred clients."""
    client, at = table.numbers("client"), begins.copy()
    for name, columns, share in PARTS:
        spent = _spent(table, columns)
        for kind, colour in kinds.items():
            mine = [row for row in rows if spent[row] > 0 and table.get("profile", {row: kind})[row] == kind]
            fill = WAITING[name] if share is None else style.tint(colour, share)
            axes.barh(
                [lanes[int(client[row])] for row in mine], [spent[row] for row in mine],
                left=[at[row] for row in mine], height=0.74, color=fill, linewidth=0,
            )  # fmt: skip
        at = at + spent


def _edges(axes: Any, run: Run, last: float) -> None:
    """Lines where rounds end, numbered at the top."""
    ends = np.cumsum(run.rounds.numbers("virtual_s"))
    for number, end in zip(run.rounds.numbers("round"), ends, strict=True):
        if number <= last:
            axes.axvline(end, color=style.MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0.5)
            axes.annotate(
                f"{number:.0f}", (end, 1), (-3, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
                ha="right", fontsize=style.SMALL, color=style.MUTED,
            )  # fmt: skip


def _legend(made: style.Picture, kinds: dict[str, str], lost: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=colour, label=kind) for kind, colour in kinds.items()]
    handles += [Patch(color=style.tint("#52606d", 0.45), label="lighter: receives, sends")]
    handles += [Patch(color=colour, label=name) for name, colour in WAITING.items()]
    if lost:
        handles.append(Line2D([], [], color="black", marker="x", linestyle="", label="dropped out, or too late"))
    style.legend(made, columns=4, loc="outside upper center", handles=handles, handlelength=1.2)


def _left_out(shown: int, clients: int, last: int, rounds: int) -> str:
    words = [f"the first {shown} of the {clients} clients that took part"] if shown < clients else []
    words += [f"rounds up to {last} of {rounds}"] if last < rounds else []
    return f"Shown are {' and '.join(words)}." if words else ""


def _cell(table: Table, name: str, row: int) -> str:
    return table.text(name)[row] if name in table else ""
