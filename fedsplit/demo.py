"""`make demo`: the main job, end to end, as a Flower simulation of ten unequal devices.

python -m fedsplit.demo [key=value ...]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fedsplit.cli.progress import table
from fedsplit.config import load
from fedsplit.runs import RunFolder, fresh
from fedsplit.runtime.superlink import flwr_run
from fedsplit.types import FedsplitError
from fedsplit.world import DEFAULT_DEVICES

CONFIG = Path("configs/demo.toml")


def main(arguments: Sequence[str]) -> int:
    """Run the demo from the top of a checkout; 0 only if the run completed."""
    console = Console()
    if not CONFIG.is_file():
        console.print(f"fedsplit.demo runs from the top of a checkout: there is no {CONFIG} here.")
        return 2
    try:
        config = load([CONFIG], arguments)
        out = Path(config.out) if config.out else fresh(Path("runs"), config.name)
        cores, devices = os.cpu_count() or 1, config.devices.count or DEFAULT_DEVICES
        console.print(
            f"Flower simulation: {devices} devices with {config.data.partition} shards of "
            f"{config.data.source} on {cores} cores; Ray starts up for some seconds first.",
            soft_wrap=True,
        )
        done = flwr_run(Path("."), {**config.values, "out": str(out.resolve())}, nodes=devices, echo=_show)
    except FedsplitError as error:
        print(f"fedsplit: {error}", file=sys.stderr)
        return 1
    folder, _ = RunFolder.open(out)
    console.print(table(folder))
    console.print(f"whole command {done.wall_s:.0f} s, Flower and Ray included")
    for what, name in (("run folder", ""), ("accuracy", "accuracy.png"), ("who holds what", "partition.png")):
        console.print(f"{what:<15} {folder.path / name}", soft_wrap=True, highlight=False)
    return 0


def _show(line: str) -> None:
    """The run's own lines; Flower's and Ray's stay in the log."""
    if line.startswith(("round ", "fedsplit_", "warning", "run folder")) or " rounds, " in line:
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
