"""`fedsplit doctor --device`: whether this machine can be a device of a deployment."""

from __future__ import annotations

import argparse
from pathlib import Path

STATE = "/var/lib/fedsplit"


def add(doctor: argparse.ArgumentParser) -> None:
    """Put the options of the check beside those of `fedsplit doctor`."""
    what = "check only what a device of a deployment needs; --config adds the memory of its part"
    doctor.add_argument("--device", action="store_true", help=what)
    reach = "with --device: a server that must be reached; repeatable"
    doctor.add_argument("--superlink", action="append", default=[], metavar="HOST:PORT", help=reach)
    trust = "with --device: certificate of the authority that signed the server's"
    doctor.add_argument("--root-certificates", metavar="ca.crt", help=trust)
    keep = f"with --device: folder of what the device keeps (default: {STATE})"
    doctor.add_argument("--state", default=STATE, metavar="DIR", help=keep)


def run(options: argparse.Namespace) -> int:
    """Print the checks; returns the exit code."""
    from fedsplit import doctor
    from fedsplit.config import load
    from fedsplit.doctor import device

    asked = device.Asked(
        config=load(options.config, options.set) if options.config or options.set else None,
        folder=Path(options.config[-1]).absolute().parent if options.config else None,
        superlinks=tuple(options.superlink),
        authority=Path(options.root_certificates) if options.root_certificates else None,
        state=Path(options.state),
    )
    found = doctor.checks(device.groups(asked))
    print(doctor.as_json(found) if options.json else doctor.report(found))
    return 1 if any(check.level == "error" for check in found) else 0
