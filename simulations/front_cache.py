"""What keeping a frozen front's outputs saves: seconds a round with `front.cache` on and off.

    python simulations/front_cache.py [--quick] [--set KEY=VALUE]...

Three configs: a linear probe (the front is all of the backbone), a U-shaped split whose two front blocks
are frozen, and SFPrompt. Medians over the rounds after the first, which fills the cache; nothing is
tested meanwhile. Seconds are this process's own on its one thread, so that other work on the machine
counts little. The server's body runs in the same process and is no part of what a cache can spare: so
the seconds outside it, at the device, are shown too, and the device's FLOPs by the ledger. On and off
must end in the same weights (`same_weights`). Prints one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from rich.console import Console
from rich.table import Table

from fedsplit.body import seat
from fedsplit.body.service import LocalBody
from fedsplit.config import Config, load
from fedsplit.experiment import start
from fedsplit.round import run_round
from fedsplit.runs import sha256
from fedsplit.runtime.inprocess import Loop
from fedsplit.types import Update
from fedsplit.world import world

TOP = Path(__file__).resolve().parent.parent
CONFIGS = {
    "linear_probe": ("configs/baselines/linear_probe.toml", []),
    "frozen_front": ("configs/demo.toml", ["train=tail", "cut.front=2", "local.epochs=1"]),
    "sfprompt": ("configs/papers/sfprompt.toml", []),
}


T = TypeVar("T")


def timed(work: Callable[..., T]) -> Callable[..., T]:
    """`work`, whose seconds are added up in `Timed.seconds`."""

    def run(*arguments: Any) -> T:
        begun = time.process_time()
        try:
            return work(*arguments)
        finally:
            Timed.seconds += time.process_time() - begun

    return run


class Timed(LocalBody):
    """A body that notes how long the server works."""

    seconds = 0.0
    forward = timed(LocalBody.forward)
    backward = timed(LocalBody.backward)
    learn = timed(LocalBody.learn)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples and rounds")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key")
    options = parser.parse_args()
    size = ["rounds=4", "data.limit=400"] if options.quick else ["rounds=6"]
    rows = [measure(name, [*size, "data.test-limit=100", *options.set]) for name in CONFIGS]
    table = Table(title="seconds a round of all devices, after the first round; front.cache off and on")
    table.add_column("config")
    for title in ("off (s)", "on (s)", "faster", "device off (s)", "device on (s)", "faster", "device FLOPs"):
        table.add_column(title, justify="right")
    table.add_column("same weights")
    for row in rows:
        seconds = [f"{row[name]:.3f}" for name in ("off_s", "on_s", "device_off_s", "device_on_s")]
        shown = [*seconds[:2], f"{row['speedup']:.1f} x", *seconds[2:], f"{row['device_speedup']:.1f} x"]
        table.add_row(row["config"], *shown, f"{100 * row['device_flops_ratio']:.1f} %", str(row["same_weights"]))
    Console(width=120).print(table)
    print(json.dumps({"rows": rows}))


def measure(name: str, pairs: list[str]) -> dict[str, Any]:
    """One config's row; `device_flops_ratio` is on over off."""
    file, changes = CONFIGS[name]
    found = {}
    for mode in ("off", "on"):
        config = load([TOP / file], [*changes, *pairs, f"front.cache={str(mode == 'on').lower()}"])
        found[mode] = rounds(config, f"{name}, {mode}")
    off, on = found["off"], found["on"]
    return {
        "config": name,
        "off_s": off["all"],
        "on_s": on["all"],
        "speedup": round(off["all"] / on["all"], 2),
        "device_off_s": off["device"],
        "device_on_s": on["device"],
        "device_speedup": round(off["device"] / on["device"], 2),
        "device_flops_ratio": on["flops"] / off["flops"],
        "same_weights": off["weights"] == on["weights"],
    }


def rounds(config: Config, name: str) -> dict[str, Any]:
    """Median seconds of a round and of its device part, device FLOPs of the last, and the final weights' sha256."""
    built = world(config)
    state, clients = start(built), Loop(config)
    everything, device, flops = [], [], 0
    with mock.patch.object(seat, "LocalBody", Timed):
        for number in range(1, config.rounds + 1):
            updates: list[Any] = []
            Timed.seconds, begun = 0.0, time.process_time()
            state = run_round(built, state, 0, clients, updates.append).state
            seconds = time.process_time() - begun
            everything.append(seconds)
            device.append(seconds - Timed.seconds)
            if failed := [update for update in updates if not isinstance(update, Update)]:
                raise SystemExit(f"{name}: {failed[0]}")
            flops = sum(update.report.client_flops for update in updates)
            print(f"  {name}: round {number} of {config.rounds}, {seconds:.3f} s", flush=True)
    medians = (round(statistics.median(times[1:]), 4) for times in (everything, device))
    return {**dict(zip(("all", "device"), medians, strict=True)), "flops": flops, "weights": sha256(state.model)}


if __name__ == "__main__":
    main()
