"""`fedsplit watch`: a run that is under way, as a live table."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

EVERY_S = 1.0


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Put the command's parser beside the others."""
    about = "show a run that is under way: rounds, sessions of devices with their rates, events, the last error"
    parser = commands.add_parser("watch", help=about, description=about)
    parser.set_defaults(handler=run)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.add_argument("--json", action="store_true", help="one JSON document of what is shown, and end")


def run(options: argparse.Namespace) -> int:
    """Show until the run has ended; returns the exit code: 1 if the run failed."""
    from fedsplit.snapshot import snapshot

    folder = Path(options.run).expanduser()
    found = snapshot(folder)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    from rich.console import Console
    from rich.live import Live

    from fedsplit.cli.frame import frame

    console = Console(highlight=False)
    if options.once:
        console.print(frame(found))
        return 0
    with Live(frame(found), console=console, auto_refresh=False) as live:
        while not (found["finished"] or found["failed"]):
            time.sleep(EVERY_S)
            found = snapshot(folder)
            live.update(frame(found), refresh=True)
    return 1 if found["failed"] else 0
