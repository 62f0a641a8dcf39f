"""`fedsplit verify`: do two runs agree, and where do they first differ."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Put the command's parser beside the others."""
    about = "say whether two runs agree in config, data and every round, and where they first differ"
    parser = commands.add_parser("verify", help=about, description=about)
    parser.set_defaults(handler=run)
    parser.add_argument("one", help="run folder")
    parser.add_argument("other", help="run folder")
    parser.add_argument("--json", action="store_true", help="one JSON document")


def run(options: argparse.Namespace) -> int:
    """Compare; the exit code is 0 if they agree, 1 if they differ."""
    from fedsplit.proof import compare

    found = compare(Path(options.one).expanduser(), Path(options.other).expanduser())
    if options.json:
        print(json.dumps(found, indent=2))
    elif found["agree"]:
        print(f"the same config, data, and {found['rounds']} rounds, to the bit")
    else:
        print("\n".join([*found["differences"], f"rounds that agree: {found['rounds']}"]))
    return 0 if found["agree"] else 1
