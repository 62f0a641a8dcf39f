"""The baselines side by side: accuracy, and what a device pays for it.

    python simulations/baselines.py [--quick] [--set KEY=VALUE]...

Every config of `configs/baselines/` and the U-shaped demo, on the same data, shards, seed, rounds and
local epochs. Communication and compute are means a device and round. Prints one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsplit import experiment
from fedsplit.cli.progress import line
from fedsplit.config import load
from fedsplit.progress import Silent
from fedsplit.runtime.inprocess import runner
from fedsplit.world import DEFAULT_DEVICES

TOP = Path(__file__).resolve().parent.parent
COLUMNS = ("config", "accuracy", "up_bytes", "down_bytes", "client_flops", "client_peak_bytes")


class Lines(Silent):
    """A line a round."""

    def row(self, row: Any) -> None:
        """Print it."""
        print(f"  {line(row)}", flush=True)


def main() -> None:
    """Run them all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples and rounds")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key")
    options = parser.parse_args()
    size = ["rounds=2", "data.limit=200", "data.test-limit=100", "data.alpha=1.0"] if options.quick else ["rounds=6"]
    files = [TOP / "configs/demo.toml", *sorted((TOP / "configs/baselines").glob("*.toml"))]
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(file, [*size, "local.epochs=2", "engine.workers=2", *options.set], folder) for file in files]
    table = Table(title="means a device and round, except accuracy (global model, last round) and peak memory")
    for name in ("config", "accuracy (%)", "up (MB)", "down (MB)", "client GFLOPs", "client peak (MB)"):
        table.add_column(name, justify="left" if name == "config" else "right")
    for row in rows:
        sizes = (f"{row[name] / 1e6:.2f}" for name in ("up_bytes", "down_bytes"))
        flops, peak = f"{row['client_flops'] / 1e9:.1f}", f"{row['client_peak_bytes'] / 1e6:.1f}"
        table.add_row(row["config"], f"{100 * row['accuracy']:.1f}", *sizes, flops, peak)
    Console(width=110).print(table)
    print(json.dumps({"rows": rows}))


def measure(file: Path, pairs: list[str], folder: str) -> dict[str, Any]:
    """One config's row."""
    print(file.stem, flush=True)
    config = load([file], [*pairs, f"out={folder}/{file.stem}"])
    clients = runner(config)
    try:
        path = experiment.run(config, clients, progress=Lines())
    finally:
        clients.close()
    summary = json.loads((path / "summary.json").read_text())
    visits = (config.devices.count or DEFAULT_DEVICES) * summary["rounds"]
    figures = [summary["accuracy"], *(summary[name] / visits for name in ("bytes_up", "bytes_down", "client_flops"))]
    return dict(zip(COLUMNS, [file.stem, *figures, summary["client_peak_bytes"]], strict=True))


if __name__ == "__main__":
    main()
