"""How a run grows with the number of devices: seconds to start, seconds a round, memory, disk.

    python simulations/scale.py --devices 1000 --per-round 50 --rounds 100
    python simulations/scale.py --devices 10000 --per-round 50 --rounds 3 --data FOLDER
    python simulations/scale.py --quick

A training in which every client keeps blocks of its own (`share.partial=ptls`, on both sides of the cut), one
step a client and round, in a fresh process, with `--runtime flwr` by `flwr run` with one client process. Memory
is the resident memory of that process and all that it starts, sampled while it works; pages that Flower's processes
share count once for each. The pictures are noise, four a device, unless --data names a folder: accuracy is not
what is measured. A start ends when the first round begins. Prints one line of JSON last: `peak_rss_bytes`,
`rss_growth_bytes` (the highest of the last rounds against the highest of as many from round 10 on), `start_s`,
`round_s` (median), `disk_bytes`, `clients_bytes` (what clients keep), `devices`, `per_round`, `rounds`, `runtime`.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from fedsplit import experiment
from fedsplit.config import Config, load, resolve
from fedsplit.runtime.inprocess import runner
from fedsplit.runtime.superlink import flwr_run
from fedsplit.types import FedsplitError, Scalar

APP = Path(__file__).resolve().parent.parent
MARK = "FEDSPLIT_SCALE_MARK"
EACH = 4
"""Noise pictures of a device."""
SETTINGS = [
    "data.partition=iid",
    "data.min-samples=1",
    "data.test-limit=200",
    "model.image-size=16",
    "cut.tail=1",
    "share.partial=ptls",
    "local.batch-size=4",
    "local.max-steps=1",
    "eval.every=10",
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, help="devices (default 1000, quick 300)")
    parser.add_argument("--per-round", type=int, help="devices a round (default 50, quick 10)")
    parser.add_argument("--rounds", type=int, help="rounds (default 100, quick 20)")
    parser.add_argument("--data", metavar="FOLDER", help="folder with train.parquet and test.parquet")
    parser.add_argument("--runtime", choices=("process", "flwr"), default="process", help="in this process, or Flower")
    parser.add_argument("--out", metavar="DIR", help="keep the run folder here")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key")
    parser.add_argument("--quick", action="store_true", help="fewer devices and rounds")
    options = parser.parse_args(arguments)
    size = dict(
        zip(("devices", "per_round", "rounds"), (300, 10, 20) if options.quick else (1000, 50, 100), strict=True)
    )
    size |= {name: value for name in size if (value := getattr(options, name)) is not None}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(options.out or f"{scratch}/run").absolute()
            source = options.data or str(noise(Path(scratch) / "noise", EACH * size["devices"]))
            names = ("devices.count", "devices.per-round", "rounds")
            pairs = [f"{name}={value}" for name, value in zip(names, size.values(), strict=True)]
            places = [f"out={out}", f"data.source={source}", *([] if options.data else [f"data.cache={scratch}/cache"])]
            config = load([], [*SETTINGS, *pairs, *places, *options.set])
            seen = Watched(config, options.runtime)
            seen.measure()
            figures = {**size, "runtime": options.runtime, **seen.figures()}
    except FedsplitError as error:
        print(f"scale.py: {error}", file=sys.stderr)
        return 2
    print(table(figures))
    print(json.dumps(figures))
    return 0


def noise(folder: Path, count: int) -> Path:
    """A data set of `count` training pictures of ten classes, 16 x 16, that show nothing."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    folder.mkdir()
    draw = np.random.default_rng(0)
    for name, number in (("train", count), ("test", 200)):
        cells = []
        for pixels in draw.integers(0, 256, (number, 16, 16, 3), dtype=np.uint8):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "BMP")
            cells.append({"bytes": buffer.getvalue()})
        pq.write_table(pa.table({"image": cells, "label": [i % 10 for i in range(number)]}), folder / f"{name}.parquet")
    return folder


@dataclass
class Watched:
    """A run in a process of its own, and the memory of that process and all below it, in bytes, by round."""

    config: Config
    runtime: str
    start_s: float = 0.0
    start_bytes: int = 0
    peaks: dict[int, int] = field(default_factory=dict)
    ends: list[float] = field(default_factory=list)

    def measure(self) -> None:
        """Run it to its end.

        Raises:
            FedsplitError: why it failed.
        """
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ[MARK] = uuid.uuid4().hex
        context = multiprocessing.get_context("spawn")
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(dict(self.config.values), self.runtime, send))
        begun = time.monotonic()
        process.start()
        send.close()
        number, folder, looked, tree = 0, Path(self.config.out), 0.0, []
        while process.is_alive():
            if self.runtime == "process" or time.monotonic() - looked > 1:
                tree, looked = processes(process.pid or 0, everywhere=self.runtime == "flwr"), time.monotonic()
            self.peaks[number] = max(self.peaks.get(number, 0), sum(map(resident_bytes, tree)))
            if not self.start_s and (folder / "partition.png").exists():
                self.start_s, self.start_bytes = time.monotonic() - begun, self.peaks[number]
                print(f"started in {self.start_s:.1f} s, {_mb(self.peaks[number])}", flush=True)
            number = self._read(folder / "rounds.csv", number)
            process.join(0.05)
        error = receive.recv() if receive.poll() else f"its process ended with code {process.exitcode}"
        if error:
            raise FedsplitError(error)

    def _read(self, rows: Path, number: int) -> int:
        """Rounds that are over; a line for those of which there was none."""
        with suppress(OSError):
            done = max(0, rows.read_bytes().count(b"\n") - 1)
            if done > number:
                self.ends += [time.monotonic()] * (done - number)
                if done % max(1, self.config.rounds // 20) == 0:
                    print(f"round {done} of {self.config.rounds}, {_mb(self.peaks[number])}", flush=True)
                return done
        return number

    def figures(self) -> Mapping[str, Any]:
        """What was measured. Round r lies between the ends of rounds r - 1 and r; after the last end is no round."""
        rounds = self.config.rounds
        few, first = max(1, rounds // 10), min(10, (rounds + 1) // 2)
        held = [self.peaks.get(number - 1, 0) for number in range(1, rounds + 1)]
        early, late = max(held[first - 1 : first - 1 + few]), max(held[-few:])
        top = max(self.peaks.values())
        if self.runtime == "process":  # what was highest between two samples
            top = max(top, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
        seconds = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
        run = Path(self.config.out)
        return {
            "start_s": round(self.start_s, 1),
            "round_s": round(statistics.median(seconds), 2) if seconds else None,
            "peak_rss_bytes": top,
            "start_rss_bytes": self.start_bytes,
            "early_rss_bytes": early,
            "late_rss_bytes": late,
            "rss_growth_bytes": late - early,
            "disk_bytes": disk_bytes(run),
            "clients_bytes": disk_bytes(run / "clients"),
        }


def work(values: Mapping[str, Scalar], runtime: str, reply: Connection) -> None:
    """The run, in its process; replies with an error's text, or an empty one."""
    try:
        config = resolve(dict(values))
        if runtime == "flwr":
            flwr_run(APP, config.values, nodes=config.devices.count, ray_cpus=1)
        else:
            clients = runner(config)
            try:
                experiment.run(config, clients)
            finally:
                clients.close()
        reply.send("")
    except FedsplitError as error:
        reply.send(str(error))


def processes(root: int, everywhere: bool) -> list[psutil.Process]:
    """The process `root` and all below it; `everywhere`, too, what it left to itself, known by its environment."""
    found: dict[int, psutil.Process] = {}
    with suppress(psutil.Error):
        top = psutil.Process(root)
        found = {one.pid: one for one in (top, *top.children(recursive=True))}
    for one in psutil.process_iter() if everywhere else ():
        with suppress(psutil.Error):
            if one.pid not in found and one.pid != os.getpid() and one.environ().get(MARK) == os.environ[MARK]:
                found |= {each.pid: each for each in (one, *one.children(recursive=True))}
    return list(found.values())


def resident_bytes(process: psutil.Process) -> int:
    """Resident memory; 0 of a process that is gone."""
    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def disk_bytes(folder: Path) -> int:
    """Sizes of all files below `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def table(figures: Mapping[str, Any]) -> str:
    """The figures for a reader."""
    lines = [
        ("devices, a round, rounds", f"{figures['devices']}, {figures['per_round']}, {figures['rounds']}"),
        ("start", f"{figures['start_s']} s"),
        ("a round (median)", f"{figures['round_s']} s"),
        ("memory, highest", _mb(figures["peak_rss_bytes"])),
        ("memory at the start", _mb(figures["start_rss_bytes"])),
        ("memory around round 10", _mb(figures["early_rss_bytes"])),
        ("memory in the last rounds", _mb(figures["late_rss_bytes"])),
        ("run folder", _mb(figures["disk_bytes"])),
        ("  of it what clients keep", _mb(figures["clients_bytes"])),
    ]
    return "\n".join(f"{name:<28}{value:>16}" for name, value in lines)


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


if __name__ == "__main__":
    sys.exit(main())
