"""A paper's scoreboard: its method beside the baselines, and its claims beside our figures.

    python simulations/paper.py METHOD|all [--data FOLDER] [--quick] [--out DIR] [--known] [--record]

Every arm, partition and seed is a run in a process and a folder of its own. With --out, runs that are
there are taken as they are and interrupted ones go on: the same command again finishes a scoreboard.
Without it nothing is kept. The tables are printed and, as Markdown, written to DIR/METHOD.md; the last
line is JSON with rows, claims and minutes. Exit code 1: a run failed. Without --data the built-in digits
are used: the claims are then judged on a far easier task than the paper's.

--record keeps the finished runs in docs/measured, and the verdicts, with the day and the commit of the runs behind
each, in docs/scoreboard.json, and writes the tables of README.md and docs/scoreboard.md from it. "all" does so for
every paper; METHOD "none" runs nothing and writes the tables alone, after a claim was reworded. With --known a run
that docs/measured has is not run again: so a scoreboard can be measured in parts, and on several machines.

On a GPU, --model NAME takes a larger backbone, e.g. vit_base_patch16_224: its weights come from timm's
hub, or from a file by --set model.checkpoint=FILE; it then runs on the GPU if there is one (device=auto).
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

from papers import PAPERS, record
from papers.conduct import add_options, conduct, folder, request, took
from papers.figures import Results, claimed_on, judge, row
from papers.scoreboard import Request, Run, Scoreboard, ablation_cells, main_cells, runs
from papers.show import WIDTH, Sheet, table_of, table_of_claims
from rich.console import Console

from fedsplit.types import FedsplitError


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one sentence."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        self.exit(2, f"paper.py: {message}; see: {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for and print it; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        boards = chosen(options.method)
        with folder(options.out) as out:
            asked = request(options, out, options.model, options.only, options.arms)
            if asked.arms and asked.only == "ablations":
                raise FedsplitError(
                    "--arms are of the main table, and --only ablations leaves it out; leave out one of the two."
                )
            return scoreboards(boards, asked, options.jobs, options.record)
    except FedsplitError as error:
        print(f"paper.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = f"; go on with the same command and --out {options.out}" if options.out else ""
        print(f"paper.py: stopped{hint}", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line."""
    lines = ["methods (minutes with --data and the standard sizes, 2 jobs on 2 cores):"]
    for name, board in PAPERS.items():
        minutes = "not measured yet" if board.minutes is None else f"{board.minutes:.0f} minutes"
        lines.append(f"  {name:<12} {board.title}: {minutes}")
    made = Parser(description=__doc__, epilog="\n".join(lines), formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("method", metavar="METHOD", help=f"{', '.join(PAPERS)}, all, or none")
    add_options(made)
    made.add_argument("--only", choices=("main", "ablations"), default="", help="one of the two tables")
    made.add_argument(
        "--arms", default="", metavar="NAME,...", help="these arms of the main table, and their reference"
    )
    made.add_argument("--model", default="fedsplit_micro", metavar="NAME", help="backbone (fedsplit_micro)")
    return made


def chosen(method: str) -> list[Scoreboard]:
    """The scoreboards that METHOD names.

    Raises:
        FedsplitError: there is none.
    """
    known = [*PAPERS, "all", "none"]
    if method not in known:
        close = difflib.get_close_matches(method, known, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        raise FedsplitError(f"No scoreboard is named '{method}'{hint}; known: {', '.join(known)}.")
    return list(PAPERS.values()) if method == "all" else [board for name, board in PAPERS.items() if name == method]


def scoreboards(boards: Sequence[Scoreboard], asked: Request, jobs: int, keep: bool = False) -> int:
    """Run, judge, print and write, and record if `keep`; returns the exit code.

    Raises:
        FedsplitError: whatever is wrong, before a run begins; or a page without a place for its table.
    """
    begun = time.monotonic()
    wanted = {board.name: runs(board, asked) for board in boards}
    say = partial(print, flush=True)
    outcome = conduct(wanted, asked, jobs, say, keep)
    failed = outcome.failed
    minutes = (time.monotonic() - begun) / 60
    rows: list[dict[str, Any]] = []
    claims: list[dict[str, Any]] = []
    kept: list[record.Entry] = []
    for board in boards:
        each = Results.of(board, wanted[board.name], outcome.summaries)
        lost = {run.name: failed[run.name] for run in wanted[board.name] if run.name in failed}
        sheets, its_rows, its_claims = tables(board, asked, each)
        foot = [*(f"Failed: {name}: {why}" for name, why in lost.items()), took(minutes, jobs, asked, outcome)]
        show(board, asked, wanted[board.name][0], sheets, foot)
        rows += its_rows
        claims += its_claims
        if not lost:
            kept += record.entries(board, asked, wanted[board.name], its_claims, outcome.summaries)
    if keep:
        record.write(kept)
        say(f"recorded {len(kept)} claims in {record.FILE}" + ("; of papers with failed runs none" if failed else ""))
    print(json.dumps({"rows": rows, "claims": claims, "minutes": round(minutes, 2)}))
    return 1 if failed else 0


def tables(
    board: Scoreboard, asked: Request, results: Results
) -> tuple[list[Sheet], list[dict[str, Any]], list[dict[str, Any]]]:
    """The tables, their rows (each once) and the judged claims; claims go with the main table."""
    cells = {"": main_cells(board, asked), "ablations": ablation_cells(board, asked)}
    rows = {cell: row(board, results, *cell) for cell in dict.fromkeys((*cells[""], *cells["ablations"]))}
    claims = [
        judge(board, claim, results, partition, asked.model)
        for claim in board.claims
        for partition in claimed_on(claim, cells[""])
    ]
    sheets = []
    for kind, its in cells.items():
        if its:
            title = f"{board.title}: {kind}" if kind else board.title
            sheets.append(table_of(board, title, [rows[cell] for cell in its]))
    if claims:
        sheets.insert(1, table_of_claims(board, claims))
    return sheets, list(rows.values()), claims


def show(board: Scoreboard, asked: Request, first: Run, sheets: Sequence[Sheet], foot: Sequence[str]) -> None:
    """Print the tables, and write them to DIR/METHOD.md."""
    config = first.config
    what = (
        f"{config.model.name} on {asked.data or 'digits'}; {config.devices.count} devices, "
        f"{config.devices.per_round or 'all'} a round, {config.rounds} rounds; seeds 0 to {asked.seeds - 1}"
    )
    if asked.quick:
        what += "; --quick: only shows that it works, its figures mean nothing"
    console = Console(width=WIDTH)
    for sheet in sheets:
        sheet.print(console)
    for note in (what, *foot):
        console.print(note, highlight=False, markup=False)
    parts = [
        f"# {board.title}\n\n{what}.\n",
        *(sheet.markdown() for sheet in sheets),
        "\n".join(f"{n}  " for n in foot),
    ]
    (asked.out / f"{board.name}.md").write_text("\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
