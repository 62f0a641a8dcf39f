"""A paper's scoreboard: its method beside the baselines, and its claims beside our figures.

    python simulations/paper.py METHOD|all [--data FOLDER] [--quick] [--out DIR] [--record]

Every arm, partition and seed is a run in a process and a folder of its own. With --out, runs that are
there are taken as they are and interrupted ones go on: the same command again finishes a scoreboard.
Without it nothing is kept. The tables are printed and, as Markdown, written to DIR/METHOD.md; the last
line is JSON with rows, claims and minutes. Exit code 1: a run failed. Without --data the built-in digits
are used: the claims are then judged on a far easier task than the paper's.

--record keeps the verdicts, with the day and the commit of the runs behind each, in docs/scoreboard.json, and
writes the tables of README.md and docs/scoreboard.md from it. "all" does so for every paper; METHOD "none" runs
nothing and writes the tables alone, after a claim was reworded.

On a GPU, --model NAME takes a larger backbone, e.g. vit_base_patch16_224: its weights come from timm's
hub, or from a file by --set model.checkpoint=FILE; it then runs on the GPU if there is one (device=auto).
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from papers import PAPERS, record
from papers.figures import Results, claimed_on, judge, row
from papers.scoreboard import Request, Run, Scoreboard, ablation_cells, main_cells, runs
from papers.show import WIDTH, Sheet, table_of, table_of_claims
from papers.stages import attack, found, prepare
from papers.work import carry_out, finished, validate
from rich.console import Console

from fedsplit.front.models import SHAPES
from fedsplit.types import FedsplitError, split_names


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
            asked = request(options, out)
            if options.record:
                record.refuse(asked)
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
    made.add_argument("--quick", action="store_true", help="one seed, few images and arms: only shows that it works")
    made.add_argument("--data", metavar="FOLDER", help="folder with train.parquet and test.parquet, e.g. CIFAR-10")
    made.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N-1 (3; with --quick 1)")
    made.add_argument("--only", choices=("main", "ablations"), default="", help="one of the two tables")
    made.add_argument(
        "--arms", default="", metavar="NAME,...", help="these arms of the main table, and their reference"
    )
    made.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time, a process each (2)")
    made.add_argument("--out", metavar="DIR", help="keep the runs here, and go on with those that are here")
    made.add_argument("--record", action="store_true", help="keep the verdicts in docs/scoreboard.json and the README")
    made.add_argument("--model", default="fedsplit_micro", metavar="NAME", help="backbone (fedsplit_micro)")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key of every run")
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


def request(options: argparse.Namespace, out: Path) -> Request:
    """The command line, checked.

    Raises:
        FedsplitError: a number below 1, or a folder without images.
    """
    seeds = (1 if options.quick else 3) if options.seeds is None else options.seeds
    for name, number in (("--seeds", seeds), ("--jobs", options.jobs)):
        if number < 1:
            raise FedsplitError(f"{name} must be at least 1, got {number}.")
    data = str(Path(options.data).expanduser().resolve()) if options.data else ""
    for file in ("train.parquet", "test.parquet") if data else ():
        if not (Path(data) / file).is_file():
            raise FedsplitError(f"--data {options.data}: there is no {file}; it needs train.parquet and test.parquet.")
    device = "cpu" if options.model in SHAPES else "auto"
    arms = split_names(options.arms)
    if arms and options.only == "ablations":
        raise FedsplitError(
            "--arms are of the main table, and --only ablations leaves it out; leave out one of the two."
        )
    return Request(out, seeds, options.quick, options.only, data, options.model, device, tuple(options.set), arms)


@contextlib.contextmanager
def folder(out: str | None) -> Iterator[Path]:
    """The folder of the runs: DIR, made when missing, or one that is gone afterwards.

    Raises:
        FedsplitError: it cannot be made.
    """
    if out is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    path = Path(out).expanduser().resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise FedsplitError(f"Cannot write --out {path}: {error.strerror}; give another folder.") from None
    yield path


def scoreboards(boards: Sequence[Scoreboard], asked: Request, jobs: int, keep: bool = False) -> int:
    """Run, judge, print and write, and record if `keep`; returns the exit code.

    Raises:
        FedsplitError: whatever is wrong, before a run begins; or a page without a place for its table.
    """
    begun = time.monotonic()
    wanted = {board.name: runs(board, asked) for board in boards}
    everything = [run for each in wanted.values() for run in each]
    say = partial(print, flush=True)
    there = sum(finished(run) is not None for run in everything)
    summaries, failed = run_all(everything, jobs, say)
    minutes = (time.monotonic() - begun) / 60
    rows: list[dict[str, Any]] = []
    claims: list[dict[str, Any]] = []
    kept: list[record.Entry] = []
    for board in boards:
        each = Results.of(board, wanted[board.name], summaries)
        lost = {run.name: failed[run.name] for run in wanted[board.name] if run.name in failed}
        sheets, its_rows, its_claims = tables(board, asked, each)
        foot = [
            *(f"Failed: {name}: {why}" for name, why in lost.items()),
            took(minutes, jobs, asked, f"{there} of {len(everything)}"),
        ]
        show(board, asked, wanted[board.name][0], sheets, foot)
        rows += its_rows
        claims += its_claims
        if not lost:
            kept += record.entries(board, asked, wanted[board.name], its_claims)
    if keep:
        record.write(kept)
        say(f"recorded {len(kept)} claims in {record.FILE}" + ("; of papers with failed runs none" if failed else ""))
    print(json.dumps({"rows": rows, "claims": claims, "minutes": round(minutes, 2)}))
    return 1 if failed else 0


def run_all(
    everything: Sequence[Run], jobs: int, say: Callable[[str], None]
) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """Harden, run and audit, as the runs ask; the summaries, and why the others failed, by the runs' names.

    Raises:
        FedsplitError: a run that cannot begin.
    """
    failed = prepare(everything, jobs, say)
    able = [run for run in everything if run.name not in failed]
    validate(able, say)
    summaries, more = carry_out(able, jobs, say)
    failed |= more | attack(able, jobs, say)
    audited = {run.name: found(Path(run.config.out)) for run in able if run.name in summaries}
    return {n: {**s, **audited[n]} for n, s in summaries.items() if n not in failed}, failed


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


def took(minutes: float, jobs: int, asked: Request, there: str) -> str:
    """How long this command took; `there` of its runs it found done."""
    cores = os.cpu_count() or 1
    old = "" if there.startswith("0 ") else f"; {there} runs were already there"
    changed = f"; {' '.join(asked.pairs)}" if asked.pairs else ""
    return f"This command took {minutes:.1f} minutes with {jobs} jobs on {cores} cores{old}{changed}."


if __name__ == "__main__":
    sys.exit(main())
