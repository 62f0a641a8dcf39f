"""Tables of a scoreboard, once as data: for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from papers.scoreboard import Scoreboard

WIDTH = 110
LEFT = ("arm", "partition", "claim", "verdict")


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
    """Accuracy and costs, a row an arm and partition."""
    columns = ("partition", "arm", "accuracy %", "client compute", "bytes", "kept", "seeds")
    cells = [
        (
            board.partition(row["partition"]).title,
            board.arm(row["arm"]).title,
            with_spread(row["accuracy_mean"], row["accuracy_std"], 100, "{:.1f}"),
            ratio("client_flops_ratio", row["client_flops_ratio"]),
            ratio("bytes_ratio", row["bytes_ratio"]),
            "-" if row["kept_samples"] is None else f"{row['kept_samples']:,.0f}",
            f"{row['seeds']}, {row['failed']} failed" if row["failed"] else str(row["seeds"]),
        )
        for row in rows
    ]
    against = board.arm(board.reference).title
    notes = [
        "Accuracy of the global model after the last round: mean ± sample standard deviation over seeds.",
        f"Client compute (FLOPs) and bytes (both ways): ratios to {against}, same partition and seed; means.",
        "Kept: samples trained on after selection, summed over clients and rounds; the mean of the seeds.",
    ]
    return Sheet(title, columns, cells, group_ends([row["partition"] for row in rows]), notes)


def table_of_claims(board: Scoreboard, claims: Sequence[Mapping[str, Any]]) -> Sheet:
    """The paper's claim beside ours, a row a claim and partition; where each comes from below."""
    texts = list(dict.fromkeys(claim["claim"] for claim in claims))
    cells, last = [], ""
    for claim in claims:
        figure, text = claim["figure"], claim["claim"]
        cells.append(
            (
                f"{texts.index(text) + 1}. {text}" if text != last else "",
                board.partition(claim["partition"]).title,
                bound(claim),
                with_figure(figure, claim["ours"], claim["ours_std"]),
                claim["verdict"],
            )
        )
        last = text
    about = {claim["claim"]: [claim["source"], claim["note"]] for claim in claims}
    notes = [f"{number}. {'; '.join(filter(None, about[text]))}." for number, text in enumerate(texts, 1)]
    columns = ("claim", "partition", "claimed", "ours", "verdict")
    return Sheet("The paper's claims beside ours", columns, cells, group_ends([c["claim"] for c in claims]), notes)


def group_ends(names: Sequence[str]) -> frozenset[int]:
    """Where the next name is another."""
    return frozenset(number for number in range(len(names) - 1) if names[number] != names[number + 1])


def ratio(figure: str, value: float | None) -> str:
    """Compute as a percentage, bytes as a factor; '-' where there is none."""
    if value is None:
        return "-"
    return f"{100 * value:.3g} %" if figure == "client_flops_ratio" else f"{value:.3g}x"


def bound(claim: Mapping[str, Any]) -> str:
    """What a claim allows, and the backbone that its number is published for."""
    figure, limit = claim["figure"], claim["claimed"]
    shown = f"{limit:.1f} points" if figure == "accuracy_points" else ratio(figure, limit)
    return f"{claim['relation']} {shown}" + (f", {claim['published_for']}" if claim["published_for"] else "")


def with_figure(figure: str, value: float | None, std: float | None) -> str:
    """Our figure, accuracy with its spread."""
    if figure == "accuracy_points" and value is not None:
        return with_spread(value, std, 1, "{:+.1f}") + " points"
    return ratio(figure, value)


def with_spread(value: float | None, std: float | None, scale: float, form: str) -> str:
    """`mean ± spread`; the mean alone of one seed, '-' of none."""
    if value is None:
        return "-"
    text = form.format(scale * value)
    return text if std is None else f"{text} ± {scale * std:.1f}"
