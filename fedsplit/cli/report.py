"""`fedsplit report`: runs as one page to look at."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from fedsplit.types import split_names


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Put the command's parser beside the others."""
    about = "draw runs, finished or not, on one self-contained page, several side by side; prints its path last"
    parser = commands.add_parser("report", help=about, description=about)
    parser.set_defaults(handler=run)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or a folder of run folders (a study)")
    where = "folder of report.html and its pictures (default: RUN/report for one, else report-<time>)"
    parser.add_argument("--out", metavar="DIR", help=where)
    what = "config keys that tell groups of runs apart, e.g. cut.front,seed; all that differ but the seed if left out"
    parser.add_argument("--group", default="", metavar="KEY,...", help=what)


def run(options: argparse.Namespace) -> int:
    """Draw the page."""
    from rich.console import Console

    from fedsplit import report
    from fedsplit.report.page import build

    runs = report.load_all(options.runs)
    alone = len(options.runs) == 1
    default = Path(options.runs[0]) / "report" if alone else Path(time.strftime("report-%Y%m%d-%H%M%S"))
    folder = Path(options.out or default).expanduser()
    console = Console(stderr=True)
    with console.status("reading") as shown:
        page = build(runs, folder, split_names(options.group), lambda name: shown.update(f"drawing {name}"))
    print(page.resolve())
    return 0
