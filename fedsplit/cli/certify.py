"""`fedsplit certify`: the certificates and keys of a deployment."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedsplit.types import FedsplitError


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Put the command's parser beside the others."""
    about = "make the certificate of a server and the keys of its devices, for TLS and `flwr supernode register`"
    parser = commands.add_parser("certify", help=about, description=about)
    parser.set_defaults(handler=run)
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder; what it lacks is made, nothing overwritten"
    )
    hosts = "names and addresses by which devices reach the server, comma-separated; repeatable"
    parser.add_argument("--host", action="append", default=[], metavar="NAME[,NAME|IP...]", help=hosts)
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="keys for devices 0 to N-1 in all")
    days = "days for which the server's certificate is valid (default: 365)"
    parser.add_argument("--days", type=int, default=365, metavar="D", help=days)


def run(options: argparse.Namespace) -> int:
    """Make what the folder lacks, and print every file made; returns the exit code."""
    try:
        from fedsplit.deploy.certificates import certify
    except ModuleNotFoundError as error:
        raise FedsplitError(f"certify needs the package '{error.name}': pip install 'fedsplit[device]'.") from error

    hosts = [host.strip() for text in options.host for host in text.split(",") if host.strip()]
    folder = Path(options.out)
    made = certify(folder, hosts, options.nodes, options.days)
    for file in made:
        print(file)
    if not made:
        print(f"{folder} has everything already")
    return 0
