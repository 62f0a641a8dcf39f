"""`fedsplit bundle`: what a device needs for an offline install."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedsplit.types import FedsplitError


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Put the command's parser beside the others."""
    about = "collect what a device needs for an offline install: wheels, its half of the weights, config, key, unit"
    parser = commands.add_parser("bundle", help=about, description=about)
    parser.set_defaults(handler=run)
    once = "TOML file; repeatable, later ones win"
    parser.add_argument("--config", action="append", default=[], metavar="F.toml", help=once)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key; repeatable")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the bundle; an unfinished one goes on")
    platform = "the device's platform, e.g. manylinux_2_28_aarch64 (glibc 2.28 or newer, 64-bit ARM)"
    parser.add_argument("--platform", required=True, metavar="TAG", help=platform)
    parser.add_argument("--python", default="3.11", metavar="3.N", help="the device's Python (default: 3.11)")
    parser.add_argument(
        "--superlink", required=True, metavar="HOST:PORT", help="the SuperLink, as the device reaches it"
    )
    parser.add_argument("--node", type=int, metavar="K", help="the device's number; without it a bundle has no key")
    parser.add_argument("--certificates", metavar="DIR", help="with --node: the folder that fedsplit certify made")
    parser.add_argument("--data", default="", metavar="DIR", help="on the device: its own folder of train.parquet")
    parser.add_argument(
        "--extra", action="append", default=[], metavar="NAME", help="an extra beside device; repeatable"
    )
    pinned = "versions of the wheels (default: constraints.txt of the checkout, else what is installed here)"
    parser.add_argument("--constraints", metavar="F.txt", help=pinned)
    pin = "another version of one package; repeatable"
    parser.add_argument("--pin", action="append", default=[], metavar="NAME=VERSION", help=pin)
    torch = "cpu (default) refuses a torch that brings CUDA, any takes what pip finds"
    parser.add_argument("--torch", choices=("cpu", "any"), default="cpu", help=torch)
    parser.add_argument("--quiet", action="store_true", help="print only the folder's path")


def run(options: argparse.Namespace) -> int:
    """Make the bundle, and print its folder last; returns the exit code."""
    from fedsplit.config import load
    from fedsplit.deploy import bundle
    from fedsplit.deploy.inputs import pins
    from fedsplit.deploy.manifest import Request
    from fedsplit.deploy.wheels import Target
    from fedsplit.world import DEFAULT_DEVICES

    config = load(options.config, options.set)
    request = Request(
        config=config,
        folder=Path(options.out),
        target=Target(options.platform, options.python),
        superlink=options.superlink,
        nodes=config.devices.count or DEFAULT_DEVICES,
        pins=pins(Path(options.constraints) if options.constraints else None, _pins(options.pin)),
        node=options.node,
        certificates=Path(options.certificates) if options.certificates else None,
        data=options.data,
        extras=frozenset(options.extra),
        cuda=options.torch == "any",
    )
    print(bundle.make(request, (lambda line: None) if options.quiet else lambda line: print(line, flush=True)))
    return 0


def _pins(pairs: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        name, _, version = (part.strip(" =") for part in pair.partition("="))
        if not name or not version:
            raise FedsplitError(f"--pin '{pair}' is not NAME=VERSION, e.g. torch=2.9.1.")
        found[name] = version
    return found
