"""The scoreboard's tables in README.md and docs/scoreboard.md, made of the entries that `papers.record` keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fedsplit.types import FedsplitError
from papers.show import bound, with_error

PAGES = ("README.md", "docs/scoreboard.md")
BEGIN, END = "<!-- scoreboard -->", "<!-- end of scoreboard -->"
NOT_RUN = "not run yet"

Entry = dict[str, Any]


def placed(text: str, table: str, name: str) -> str:
    """The page with its table between the two markers.

    Raises:
        FedsplitError: it does not have each of them once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise FedsplitError(f"{name} needs one '{BEGIN}' and, below it, one '{END}'.")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n{END}{rest.split(END)[1]}"


def tables(every: Sequence[Entry]) -> list[tuple[str, str]]:
    """The pages and their tables."""
    return list(zip(PAGES, (short_table(every), long_tables(every)), strict=True))


def short_table(every: Sequence[Entry]) -> str:
    """How many claims of each paper hold, then a row a claim and partition, on the first data set of each paper.

    Claims that are not run yet are there, too.
    """
    first: dict[str, str] = {}
    partitions: dict[str, set[str]] = {}
    for entry in every:
        if entry["data"]:
            first.setdefault(entry["method"], entry["data"])
        partitions.setdefault(entry["method"], set()).add(entry["partition"])
    shown = [entry for entry in every if entry["data"] in ("", first.get(entry["method"]))]
    lines = ["| paper | claim | published | ours | verdict | command | date, commit |", "|---|---|---|---|---|---|---|"]
    for entry in shown:
        where = f"{entry['partition']}: " if len(partitions[entry["method"]]) > 1 else ""
        cells = (
            _name(entry),
            where + entry["claim"],
            _published(entry),
            _ours(entry),
            _verdict(entry),
            f"`{entry['command']}`",
            _origin(entry),
        )
        lines.append(f"| {' | '.join(cells)} |")
    # Folded, where the page is shown: seventy rows would bury what comes after.
    folded = ["<details>", f"<summary>All {len(shown)} rows, a claim each</summary>", "", *lines, "", "</details>"]
    return "\n".join([*_counts(shown), "", *folded]) + "\n"


def _counts(shown: Iterable[Entry]) -> list[str]:
    """A row a paper: how many claims, stated in it and of our own bar, hold of those that were judged."""
    papers: dict[str, list[Entry]] = {}
    for entry in shown:
        papers.setdefault(_name(entry), []).append(entry)
    lines = ["| paper | of its own claims hold | of our bars hold | not run yet |", "|---|---|---|---|"]
    for name, its in papers.items():
        judged = [entry for entry in its if entry["ours"] is not None]
        stated, ours = ([e for e in judged if _stated(e) == own] for own in (True, False))
        cells = (*(f"{sum(e['holds'] for e in some)} of {len(some)}" if some else "-" for some in (stated, ours)),)
        lines.append(f"| {name} | {' | '.join(cells)} | {len(its) - len(judged) or '-'} |")
    return lines


def long_tables(every: Sequence[Entry]) -> str:
    """A section a paper, a table a data set: with partitions, seeds, and where a claim comes from."""
    parts: list[str] = []
    groups: dict[str, dict[str, list[Entry]]] = {}
    for entry in every:
        groups.setdefault(entry["paper"], {}).setdefault(entry["data"], []).append(entry)
    for paper, by_data in groups.items():
        parts.append(f"## {paper}\n")
        texts = list(dict.fromkeys(entry["claim"] for its in by_data.values() for entry in its))
        for data, its in by_data.items():
            scales = "; ".join(dict.fromkeys(entry["scale"] for entry in its))
            parts.append(f"**{data}**: {scales}.\n" if data else f"**{NOT_RUN.capitalize()}**\n")
            parts += [f"    {text}" for text in dict.fromkeys(entry["command"] for entry in its)]
            parts.append("\n| | claim | partition | published | ours | seeds | verdict | date, commit |")
            parts.append("|---|---|---|---|---|---|---|---|")
            parts += [_row(texts.index(entry["claim"]) + 1, entry) for entry in its]
            parts.append("")
        sources = {entry["claim"]: entry["source"] for its in by_data.values() for entry in its}
        numbers: dict[str, list[str]] = {}
        for number, text in enumerate(texts, 1):
            numbers.setdefault(sources[text], []).append(str(number))
        parts += ["Where the claims come from:\n"]
        parts += [f"- {', '.join(its)}: {source}." for source, its in numbers.items()] + [""]
    return "\n".join(parts)


def _row(number: int, entry: Entry) -> str:
    cells = (number, entry["claim"], entry["partition"], _published(entry), _ours(entry), entry["seeds"] or "-")
    return f"| {' | '.join(map(str, (*cells, _verdict(entry), _origin(entry))))} |"


def _origin(entry: Entry) -> str:
    return ", ".join(filter(None, (entry["date"], entry["commit"]))) or "-"


def _name(entry: Entry) -> str:
    return str(entry["paper"]).partition(" (")[0]


def _stated(entry: Entry) -> bool:
    """Whether the paper gives the number."""
    return entry["source"].startswith("stated in the paper") and "our reading" not in entry["source"]


def _published(entry: Entry) -> str:
    """The bound; said to be ours where the paper gives no number."""
    return bound(entry) if _stated(entry) else f"our bar: {bound(entry)}"


def _ours(entry: Entry) -> str:
    return with_error(entry["figure"], entry["ours"], entry["ours_std"])


def _verdict(entry: Entry) -> str:
    """The verdict, a miss in bold; and whether the distance to the bound is within the spread over seeds."""
    if entry["ours"] is None:
        return str(entry["verdict"])
    spread = entry["ours_std"] or 0.0
    close = ", within the spread" if 0 < abs(entry["ours"] - entry["claimed"]) <= spread else ""
    return f"{entry['verdict'] if entry['holds'] else '**' + entry['verdict'] + '**'}{close}"
