"""Predicted against measured seconds of clients' rounds on this machine.

    python simulations/calibration.py

calibrates this machine for a config (`fedsplit doctor --calibrate`), gives the profile to all devices, runs the config
with clients in turn, and compares the virtual seconds of all clients' rounds with those that they really took. The
server's body runs here, too: its rate is that of training the whole model. CPU seconds by default, since other
processes disturb them less; `--wall` takes wall time. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsplit import experiment
from fedsplit.config import Config, load
from fedsplit.devices.calibrate import measure, profile_of
from fedsplit.runs import RunFolder
from fedsplit.runtime.inprocess import Loop, execute
from fedsplit.types import Failure, Job, Update

TOP = Path(__file__).resolve().parents[1]
FILES = ("configs/baselines/fedavg.toml", "configs/demo.toml", "configs/papers/sfprompt.toml")
PAIRS = ("data.test-limit=40", "data.partition=iid", "devices.count=3", "rounds=1", "server.schedule=splitfed-v2")


@dataclass
class Timed(Loop):
    """One client after another, timed."""

    cpu: bool = True
    spent_s: float = 0.0

    def run(self, jobs: Sequence[Job]) -> Iterator[Update | Failure]:
        """One result per job, in order."""
        clock = time.process_time if self.cpu else time.perf_counter
        for job in jobs:
            begun = clock()
            result = execute(self.config, job, disposable=False)
            self.spent_s += clock() - begun
            yield result


def compare(name: str, file: str, pairs: Sequence[str], repeats: int, cpu: bool) -> dict[str, Any]:
    """A row: both sums of seconds, and the error of the prediction."""
    config = load([TOP / file], [*PAIRS, *pairs])
    clock = time.process_time if cpu else time.perf_counter
    own = measure(config, repeats, clock)
    whole = measure(load([TOP / FILES[0]], [*PAIRS, *pairs]), repeats, clock)
    with tempfile.TemporaryDirectory() as folder:
        board = Path(folder) / "here.toml"
        board.write_text(profile_of(config, own, "here")[1], encoding="utf-8")
        rate = whole.train_flops_per_s
        config = _at(config, board, rate).replace(out=str(Path(folder) / "run"))
        runner = Timed(config, cpu)
        rows = RunFolder(experiment.run(config, runner)).rows("clients")
    predicted = sum(float(row["virtual_s"]) for row in rows)
    return {
        "config": name, "train_flops_per_s": own.train_flops_per_s, "infer_flops_per_s": own.infer_flops_per_s,
        "predicted_s": predicted, "measured_s": runner.spent_s, "error": predicted / runner.spent_s - 1,
    }  # fmt: skip


def _at(config: Config, board: Path, rate: float) -> Config:
    return config.replace(devices__fleet=str(board), devices__server_flops_per_s=rate)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few samples, once")
    parser.add_argument("--wall", action="store_true", help="wall time instead of CPU time")
    parser.add_argument("--only", choices=[Path(file).stem for file in FILES], help="one of the configs")
    asked = parser.parse_args(arguments)
    little = ("data.limit=60", "data.allow-missing-classes=true")
    pairs, times, repeats = (little, 1, 3) if asked.quick else (("data.limit=120",), 2, 10)
    rows = []
    for file in (file for file in FILES if asked.only in (None, Path(file).stem)):
        for _ in range(times):
            rows.append(compare(Path(file).stem, file, pairs, repeats, not asked.wall))
            row = rows[-1]
            print(
                f"{row['config']:<10} predicted {row['predicted_s']:8.2f} s  measured {row['measured_s']:8.2f} s  "
                f"error {100 * row['error']:+6.1f} %",
                flush=True,
            )
    print(json.dumps({"rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
