"""What a broken client costs: for every kind of fault, whether the run holds.

    python simulations/faults.py [--quick]

Three devices train digits for two rounds, and in round 1 one of them fails: it raises, hangs, sends
a NaN, a wrong shape, a wrong name, an impossible sample count, far too many bytes, or its process is
killed (in a pool of two). A row holds when the run completes with the failure counted and named, its
weights are finite, and they equal, bit for bit, those of a run in which the failed clients were never
there. A killed process may take the other client of the pool with it for that round. `hang` raises
here: only Flower has a time limit that ends it. Without `--quick` also for the schedules that take
clients in turn. Prints one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from fedsplit import experiment
from fedsplit.config import Config, resolve
from fedsplit.runs import RunFolder
from fedsplit.runtime.faults import KINDS
from fedsplit.runtime.inprocess import Loop, runner
from fedsplit.types import Failure, Job, Update

CLIENT, ROUND, ROUNDS, DEVICES = 2, 1, 2, 3


@dataclass
class Without(Loop):
    """A fleet in which the clients `absent` were never there in round 1."""

    absent: frozenset[int] = field(default_factory=frozenset)

    def run(self, jobs: Sequence[Job]) -> Iterator[Update | Failure]:
        """One result per job of those who are there."""
        yield from super().run([job for job in jobs if job.round != ROUND or job.client not in self.absent])


def main() -> None:
    """Break, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one schedule, one step a round")
    options = parser.parse_args()
    schedules = ("splitfed-v1",) if options.quick else ("splitfed-v1", "splitfed-v2", "sequential")
    rows: list[dict[str, str | bool]] = []
    for schedule in schedules:
        config = tiny(schedule, steps=1 if options.quick else 4)
        honest: dict[frozenset[int], str] = {}
        for kind in KINDS:
            begun = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                verdict = holds(config, kind, Path(folder), honest)
            rows.append({"fault": kind, "schedule": schedule, "held": not verdict})
            said = verdict or "held"
            print(f"{schedule:<12} {kind:<9} {said}  ({time.monotonic() - begun:.1f} s)", flush=True)
    print(json.dumps({"rows": rows}))


def tiny(schedule: str, steps: int) -> Config:
    """Two rounds over three devices; one success is a quorum, since a killed process may take its neighbour along."""
    return resolve(
        {
            "data.limit": 120,
            "data.test-limit": 40,
            "data.partition": "iid",
            "devices.count": DEVICES,
            "rounds": ROUNDS,
            "local.batch-size": 8,
            "local.max-steps": steps,
            "server.schedule": schedule,
            "share.quorum": 0.0,
        }
    )


def holds(config: Config, kind: str, folder: Path, honest: dict[frozenset[int], str]) -> str:
    """What does not hold when `kind` happens; empty if all does. `honest` keeps the references."""
    broken = config.replace(
        engine__faults=f"{kind}:{CLIENT}@{ROUND}",
        engine__workers=2 if kind == "kill" else 1,
        out=str(folder / "run"),
    )
    clients = runner(broken)
    try:
        run = RunFolder(experiment.run(broken, clients))
    except Exception as error:  # whatever ends the run is the finding
        return f"the run ended: {type(error).__name__}: {error}"
    finally:
        clients.close()
    summary = json.loads((run.path / "summary.json").read_text())
    rows = run.rows("clients")
    failed = frozenset(int(row["client"]) for row in rows if row["failure"])
    if {row["round"] for row in rows if row["failure"]} != {str(ROUND)} or CLIENT not in failed:
        return "the failure is not in clients.csv"
    if kind != "kill" and failed != {CLIENT}:
        return f"clients {sorted(failed)} failed, only {CLIENT} was broken"
    if summary["failures"] != len(failed) or summary["rounds"] != ROUNDS:
        return f"{summary['failures']} failures and {summary['rounds']} rounds are counted"
    if not all(torch.isfinite(value).all() for value in load_file(run.path / "model.safetensors").values()):
        return "the weights are not finite"
    if failed not in honest:
        out = experiment.run(config.replace(out=str(folder / "honest")), Without(config, failed))
        honest[failed] = json.loads((out / "summary.json").read_text())["weights_sha256"]
    if summary["weights_sha256"] != honest[failed]:
        return "the weights are not those of the clients that were left"
    return ""


if __name__ == "__main__":
    main()
