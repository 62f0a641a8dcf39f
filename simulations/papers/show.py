"""Tables of a scoreboard, once as data: for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsplit.sweep.table import with_spread
from papers.scoreboard import Scoreboard

WIDTH = 110
LEFT = ("arm", "partition", "claim", "verdict")
TARGET = "up to the first round in which the global model has the target accuracy; 0 where it never has"

# Title and meaning of a column, and how its cells are written; of `papers.figures.FIGURES`, or of a summary.
COLUMNS: dict[str, tuple[str, str, str]] = {
    "client_flops_ratio": ("client compute", "FLOPs of all clients", "%"),
    "server_flops_ratio": ("server compute", "FLOPs of the server", "%"),
    "compute_ratio": ("all compute", "FLOPs of clients and server", "%"),
    "server_peak_ratio": ("peak", "the server's largest memory in any round", "%"),
    "round_peak_ratio": ("mean peak", "the server's peak memory in a client's round, mean of all", "%"),
    "traffic_ratio": ("subnet traffic", "if each unit had a machine of its own; in full 2, forward only 1", "%"),
    "bytes_ratio": ("bytes", "between clients and server, both ways", "x"),
    "accuracy_points": ("points", "accuracy less that of the reference", "points"),
    "bytes_speedup": ("fewer bytes", f"bytes, both ways, {TARGET}", "x"),
    "virtual_s": ("virtual s", "modelled seconds of the whole run", "number"),
    "energy_j": ("joules", "modelled energy of all devices, the whole run", "number"),
    "virtual_speedup": ("virtual speed", f"modelled seconds {TARGET}", "x"),
    "wall_speedup": ("wall speed", f"seconds that the clients' rounds took here {TARGET}", "x"),
    "compute_speedup": ("compute speed", f"the server's FLOPs {TARGET}", "x"),
    "kept_samples": ("kept", "samples trained on after selection, summed over clients and rounds", "number"),
    "workload_variance": ("load variance", "of the server workers' loads, as fractions of a full load", "small"),
    "worst_ssim": ("worst SSIM", "mean SSIM of the strongest attack's reconstructions; low is safer", "score"),
    "worst_psnr": ("worst PSNR", "mean PSNR in dB of the strongest attack's; low is safer", "decibel"),
    "worst_identified": (
        "identified %",
        "reconstructions that a classifier recognises, worst attack; low is safer",
        "accuracy",
    ),
    "worst_labels_right": ("labels %", "labels inferred from gradients; low is safer", "accuracy"),
    "rank1": ("rank-1 %", "queries of unseen classes whose nearest image is of their class", "accuracy"),
    "map": ("mAP %", "mean average precision of these queries", "accuracy"),
    "ssim": ("SSIM", "mean SSIM of the strongest attack's reconstructions; low is safer", "score"),
    "ssim_gap": ("SSIM gap", "worst SSIM less that of the other; low is safer", "gap"),
    "personal_accuracy": ("personal %", "clients' own models on their own held-out samples, last rounds", "accuracy"),
}


@dataclass(frozen=True)
class Sheet:
    """A table of texts with lines below it; `ends` are the numbers of the rows that a group ends with."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    ends: frozenset[int] = frozenset()
    notes: Sequence[str] = field(default_factory=list)

    def print(self, console: Console) -> None:
        """Show it in a terminal."""
        table = Table(title=self.title, title_justify="left", show_edge=False)
        for name in self.columns:
            table.add_column(name, justify="left" if name in LEFT else "right")
        for number, cells in enumerate(self.rows):
            table.add_row(*cells, end_section=number in self.ends)
        console.print(table)
        for note in self.notes:
            console.print(note, highlight=False, markup=False)

    def markdown(self) -> str:
        """The same as Markdown."""
        rule = [":--" if name in LEFT else "--:" for name in self.columns]
        lines = [f"| {' | '.join(cells)} |" for cells in (self.columns, rule, *self.rows)]
        return "\n".join([f"## {self.title}", "", *lines, "", *(f"{note}  " for note in self.notes)]) + "\n"


def table_of(board: Scoreboard, title: str, rows: Sequence[Mapping[str, Any]]) -> Sheet:
    """Accuracy and costs, a row an arm and partition; without columns of which no run that ended has a figure."""
    ended = any(row["accuracy_mean"] is not None for row in rows)
    shown = [name for name in board.columns if not ended or any(row[name] is not None for row in rows)]
    columns = (*places(board), "arm", "accuracy %", *(COLUMNS[name][0] for name in shown), "seeds")
    cells = [
        (
            *places(board, row["partition"]),
            board.arm(row["arm"]).title,
            with_spread(row["accuracy_mean"], row["accuracy_std"], 100, "{:.1f}"),
            *(cell(name, row[name]) for name in shown),
            f"{row['seeds']}, {row['failed']} failed" if row["failed"] else str(row["seeds"]),
        )
        for row in rows
    ]
    against = " or ".join(dict.fromkeys(board.arm(board.against(row["arm"])).title for row in rows))
    notes = [
        "Accuracy of the global model after the last round: mean ± sample standard deviation over seeds.",
        f"Ratios, speed-ups and points: to {against}, same partition and seed; means.",
        *dict.fromkeys(f"{COLUMNS[name][0].capitalize()}: {COLUMNS[name][1]}." for name in shown),
        *board.notes,
    ]
    return Sheet(where(board, title), columns, cells, group_ends([row["partition"] for row in rows]), notes)


def table_of_claims(board: Scoreboard, claims: Sequence[Mapping[str, Any]]) -> Sheet:
    """The paper's claim beside ours, a row a claim and partition; where each comes from below."""
    texts = list(dict.fromkeys(claim["claim"] for claim in claims))
    cells, last = [], ""
    for claim in claims:
        figure, text = claim["figure"], claim["claim"]
        cells.append(
            (
                f"{texts.index(text) + 1}. {text}" if text != last else "",
                *places(board, claim["partition"]),
                bound(claim),
                with_figure(figure, claim["ours"], claim["ours_std"]),
                claim["verdict"],
            )
        )
        last = text
    about = {claim["claim"]: [claim["source"], claim["note"]] for claim in claims}
    notes = [f"{number}. {'; '.join(filter(None, about[text]))}." for number, text in enumerate(texts, 1)]
    columns = ("claim", *places(board), "claimed", "ours", "verdict")
    return Sheet(
        where(board, "The paper's claims beside ours"), columns, cells, group_ends([c["claim"] for c in claims]), notes
    )


def places(board: Scoreboard, partition: str = "") -> tuple[str, ...]:
    """The partition's cell of a row, or its title; no cell where there is one partition only."""
    if len(board.partitions) == 1:
        return ()
    return (board.partition(partition).title if partition else "partition",)


def where(board: Scoreboard, title: str) -> str:
    """A table's title, with the partition if there is only one."""
    return f"{title}, {board.partitions[0].title}" if len(board.partitions) == 1 else title


def group_ends(names: Sequence[str]) -> frozenset[int]:
    """Where the next name is another."""
    return frozenset(number for number in range(len(names) - 1) if names[number] != names[number + 1])


def cell(figure: str, value: float | None) -> str:
    """A figure as its column has it; '-' where there is none."""
    if value is None:
        return "-"
    form = {"%": "{:.3g} %", "x": "{:.3g}x", "points": "{:+.1f}", "number": "{:,.0f}", "small": "{:.2g}"}
    form |= {"score": "{:.3f}", "gap": "{:+.3f}"}
    kind = COLUMNS[figure][2]
    scaled = 100 * value if kind in ("%", "accuracy") else value
    return form.get(kind, "{:.1f}").format(scaled)


def bound(claim: Mapping[str, Any]) -> str:
    """What a claim allows, and the backbone that its number is published for."""
    figure, limit = claim["figure"], claim["claimed"]
    shown = (
        (f"{limit:.1f}" if limit == round(limit, 1) else f"{limit:g}") + " points"
        if figure == "accuracy_points"
        else cell(figure, limit)
    )
    return f"{claim['relation']} {shown}" + (f", {claim['published_for']}" if claim["published_for"] else "")


def with_figure(figure: str, value: float | None, std: float | None) -> str:
    """Our figure, accuracy with its spread."""
    if figure == "accuracy_points" and value is not None:
        return with_spread(value, std, 1, "{:+.1f}") + " points"
    return cell(figure, value)


def with_error(figure: str, value: float | None, std: float | None) -> str:
    """Our figure with its spread over seeds, where that is a hundredth of it or more."""
    text = with_figure(figure, value, std)
    if figure == "accuracy_points" or value is None or std is None or std < 0.01 * abs(value):
        return text
    return f"{text} ± {100 * std if COLUMNS[figure][2] == '%' else std:.1g}" if std else text
