"""What breaks, and whether the run holds: in a simulation, at a served body, and among live processes.

    python simulations/faults.py [--quick] [--where simulation,stream,processes] [--faults FILE.toml]

The faults are those of faults.toml. A row holds when the run completes, its record names the failure where there is
one, its weights are finite, and they equal, bit for bit, those of a run in one process in which the failed clients
were never there in that round; where a run is resumed, or a connection made anew, those of one that nothing happened
to. In a simulation a killed process may take the other client of its pool with it; `hang` raises there, since only
Flower has a time limit. `--quick` is one schedule in a simulation, and every fault of the stream. Prints a line of
JSON last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import torch
from drills import broken, live
from drills.broken import Without
from drills.streamed import devices
from safetensors.torch import load_file

from fedsplit import experiment
from fedsplit.config import Config, resolve
from fedsplit.runs import RunFolder
from fedsplit.runtime.inprocess import runner
from fedsplit.runtime.localnet import local_net
from fedsplit.types import Scalar

ROOT = Path(__file__).resolve().parents[1]
CLIENT, ROUND, ROUNDS, DEVICES = 2, 1, 2, 3
PLACES = ("simulation", "stream", "processes")
Honest = dict[frozenset[tuple[int, int]], str]


def main() -> None:
    """Break, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="no live processes; one schedule, one step a round")
    parser.add_argument("--where", default="", help=f"some of {','.join(PLACES)}")
    parser.add_argument("--faults", type=Path, default=Path(__file__).with_suffix(".toml"), help="the list of faults")
    options = parser.parse_args()
    faults = tomllib.loads(options.faults.read_text(encoding="utf-8"))
    where = tuple(filter(None, options.where.split(","))) or (PLACES[:2] if options.quick else PLACES)
    rows: list[dict[str, str | bool]] = []

    def drill(place: str, name: str, holds: Callable[[Path], str]) -> None:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            verdict = holds(Path(folder))
        rows.append({"where": place, "fault": name, "held": not verdict})
        print(f"{place:<24} {name:<45} {verdict or 'held'}  ({time.monotonic() - begun:.1f} s)", flush=True)

    if "simulation" in where:
        for schedule in ("splitfed-v1",) if options.quick else ("splitfed-v1", "splitfed-v2", "sequential"):
            config, honest = tiny(schedule, steps=1 if options.quick else 4), Honest()
            for kind in faults["simulation"]:
                drill(f"simulation {schedule}", kind, lambda folder: simulated(config, kind, folder, honest))  # noqa: B023
    if "stream" in where:
        known = Honest()
        for name, says in faults["stream"].items():
            drill("stream", name, lambda folder: streamed(name, says, folder, known))  # noqa: B023
    if "processes" in where:
        for name, says in faults["processes"].items():
            drill("processes", name, lambda folder: lived(name, says, folder))  # noqa: B023
    print(json.dumps({"rows": rows}))


def tiny(schedule: str, steps: int) -> Config:
    """Two rounds over three devices; one success is a quorum, since a killed process may take its neighbour along."""
    return resolve(
        {
            "model.name": "fedsplit_nano",
            "model.pretrained": False,
            "cut.front": 1,
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


def simulated(config: Config, kind: str, folder: Path, honest: Honest) -> str:
    """What does not hold when `kind` happens to a client of this process; empty if all does."""
    broken_run = config.replace(
        engine__faults=f"{kind}:{CLIENT}@{ROUND}",
        engine__workers=2 if kind == "kill" else 1,
        out=str(folder / "run"),
    )
    clients = runner(broken_run)
    try:
        run = RunFolder(experiment.run(broken_run, clients))
    except Exception as error:  # whatever ends the run is the finding
        return f"the run ended: {type(error).__name__}: {error}"
    finally:
        clients.close()
    failed = failures(run)
    if (CLIENT, ROUND) not in failed or {number for _, number in failed} != {ROUND}:
        return "the failure is not in clients.csv"
    if kind != "kill" and failed != {(CLIENT, ROUND)}:
        return f"{sorted(failed)} failed, only client {CLIENT} was broken"
    return compared(run, config, folder, failed, honest)


def streamed(name: str, says: str, folder: Path, honest: Honest) -> str:
    """What does not hold when a device at the served body is broken; empty if all does."""
    with devices(broken.TINY, folder, packet_bytes=broken.MOST_BYTES) as fleet:
        fleet.works[broken.BROKEN, broken.ROUND] = broken.WORKS[name]
        try:
            run = RunFolder(experiment.run(fleet.config, fleet))
        except Exception as error:  # whatever ends the run is the finding
            return f"the run ended: {type(error).__name__}: {error}"
        if any(one.state not in ("done", "gone") for one in fleet.reception.server.sessions()):
            return "a session is still open"
    failed = failures(run, says)
    if failed != {(broken.BROKEN, broken.ROUND)}:
        return f"clients.csv does not say '{says}' of the broken client alone"
    return compared(run, resolve(broken.TINY), folder, failed, honest)


def lived(name: str, says: str, folder: Path) -> str:
    """What does not hold when it happens to live processes; empty if all does."""
    values: dict[str, Scalar] = {**live.LIVE, "out": str(folder / "run"), "link.listen": live.free_address()}
    try:
        with local_net(ROOT, 2) as net:
            live.FAULTS[name](net, values)
    except Exception as error:  # whatever ends the run is the finding
        return f"the run ended: {type(error).__name__}: {error}"
    run = RunFolder(folder / "run")
    failed = failures(run, says)
    if bool(failed) != bool(says) or {client for client, _ in failed} - {live.VICTIM}:
        return f"clients.csv does not say '{says}' of client {live.VICTIM} alone: {sorted(failures(run))}"
    return compared(run, resolve(live.LIVE), folder, failures(run), {})


def failures(run: RunFolder, says: str = "") -> frozenset[tuple[int, int]]:
    """Which (client, round) failed, with `says` in the reason."""
    rows = [row for row in run.rows("clients") if row["failure"] and says in row["failure"]]
    return frozenset((int(row["client"]), int(row["round"])) for row in rows)


def compared(run: RunFolder, config: Config, folder: Path, failed: frozenset[tuple[int, int]], honest: Honest) -> str:
    """Whether the run counts its failures, and its weights are those of the clients that were left."""
    summary = json.loads((run.path / "summary.json").read_text())
    if summary["failures"] != len(failed) or summary["rounds"] != config.rounds:
        return f"{summary['failures']} failures and {summary['rounds']} rounds are counted"
    if not all(torch.isfinite(value).all() for value in load_file(run.path / "model.safetensors").values()):
        return "the weights are not finite"
    if failed not in honest:
        plain = config.replace(out=str(folder / "honest"))
        out = experiment.run(plain, Without(plain, failed))
        honest[failed] = json.loads((out / "summary.json").read_text())["weights_sha256"]
    return "" if summary["weights_sha256"] == honest[failed] else "the weights are not those of the clients left"


if __name__ == "__main__":
    main()
