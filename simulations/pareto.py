"""Privacy against accuracy against cost: cut depths times defences times strengths, each trained and attacked.

    python simulations/pareto.py [--data FOLDER] [--cuts 0,1,2,4] [--defences noise,shuffle] [--seeds N]
        [--out DIR] [--quick]

Every point is a federated run (all of the model trains, the defence in place) and a `fedsplit audit` of it by two
attacks, `linear` and `inverse-net` (where the defence draws anew for every upload `averaged`, the same network on the
mean of four): worst_ssim is the worse of these, and a whole suite may find more. With --out
points that are there stay. Prints a table, writes pareto.csv and pareto.png, and one line of JSON last with `rows`:
cut, defence, strength, accuracy, worst_ssim, client_flops, bytes, means over seeds, and whether no other point has
lower SSIM and higher accuracy at no more client FLOPs (`front`). `matched` are the defences at equal accuracy: of
each at every cut the strength with the lowest SSIM that loses at most a point to no defence at that cut.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from papers.conduct import add_options, conduct, folder, request
from papers.figures import Results
from papers.patrol import ANEW
from papers.scoreboard import Arm, Pairs, Partition, Request, Scoreboard, Sizes, runs
from rich.console import Console
from rich.table import Table

from fedsplit.report.figures.tradeoff import Point, drawn, unbeaten
from fedsplit.types import FedsplitError

# Defence -> list key, and its strengths from weak to strong as pairs.
DEFENCES: dict[str, tuple[str, tuple[str, ...]]] = {
    "none": ("", ("",)),
    "noise": ("front.edits", ("front.noise.scale=0.3", "front.noise.scale=1", "front.noise.scale=3")),
    "feature-dropout": (
        "front.edits",
        ("front.feature-dropout.keep=0.8", "front.feature-dropout.keep=0.5", "front.feature-dropout.keep=0.2"),
    ),
    "shuffle": ("front.edits", ("front.shuffle.fraction=0.5", "front.shuffle.fraction=1.0")),
    "quantize": ("front.edits", ("front.quantize.bits=4", "front.quantize.bits=2", "front.quantize.bits=1")),
    "bottleneck": ("front.edits", ("front.bottleneck.rank=32", "front.bottleneck.rank=8")),
    "merge": ("front.edits", ("front.merge.window=2", "front.merge.window=4")),
    "nopeek": ("front.penalties", ("front.nopeek.weight=0.3", "front.nopeek.weight=3")),
    "lipschitz": ("front.penalties", ("front.lipschitz.alpha=0.03", "front.lipschitz.alpha=0.3")),
    "adversary": ("front.penalties", ("front.adversary.beta=1", "front.adversary.beta=10")),
}
AVERAGED: Pairs = ("audit.attacks=linear,averaged", "audit.uploads=4")
TITLE = "Privacy (worst SSIM, low is safer) against accuracy and cost; * no other point is better"
POINTS = 1.0  # so many points of accuracy are still called equal
COLUMNS = ("cut", "defence", "strength", "accuracy", "worst_ssim", "client_flops", "bytes", "front", "seeds")


def arms(cuts: Sequence[int], defences: Sequence[str]) -> tuple[Arm, ...]:
    """An arm a point; its title is 'cut|defence|strength'."""
    made = []
    for cut in cuts:
        for defence in defences:
            key, strengths = DEFENCES[defence]
            for number, strength in enumerate(strengths):
                pairs = (f"cut.front={cut}", *((f"{key}={defence}", strength) if key else ()))
                value = strength.rpartition("=")[2]
                audit = AVERAGED if defence in ANEW else ()
                name, title = f"cut{cut}-{defence}-{number}", f"{cut}|{defence}|{value}"
                made.append(Arm(name, title, "demo.toml", pairs, audit=audit))
    return tuple(made)


def board(cuts: Sequence[int], defences: Sequence[str]) -> Scoreboard:
    """The points as a scoreboard."""
    every = arms(cuts, defences)
    return Scoreboard(
        name="pareto",
        title="Privacy, accuracy, cost",
        arms=every,
        partitions=(Partition("iid", "IID", ("data.partition=iid",)),),
        ablations=(),
        claims=(),
        reference=every[0].name,
        ablated=(),
        ablated_on=(),
        quick_partitions=("iid",),
        quick_ablations=(),
        # Of 16 fronts of `paper.py patrol` one of the two was the strongest of suite 'quick' on 15; `rmle`, which was
        # on the last (0.25 to 0.22), takes longer than all else of that suite.
        audit=("audit.victims=32", "audit.attacks=linear,inverse-net"),
        quick_audit=("audit.victims=8", "audit.images=64", "audit.attacks=closed-form,linear"),
        sizes=Sizes(
            images=("devices.count=10", "rounds=4", "data.limit=1000", "data.test-limit=1000", "optimizer.lr=0.001"),
            digits=("devices.count=10", "rounds=3"),
            quick=("devices.count=2", "rounds=1", "data.limit=100", "data.test-limit=80"),
        ),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for and print it; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        cuts, defences = chosen(options)
        with folder(options.out) as out:
            return study(board(cuts, defences), request(options, out), options.jobs, options.record)
    except FedsplitError as error:
        print(f"pareto.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pareto.py: stopped", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--cuts", default="", help="blocks at the client, comma-separated (0,1,2,4)")
    made.add_argument("--defences", default="", help=f"comma-separated, of {', '.join(DEFENCES)} (all)")
    add_options(made)
    return made


def chosen(options: argparse.Namespace) -> tuple[list[int], list[str]]:
    """Cuts and defences of the command line.

    Raises:
        FedsplitError: no number, or no defence.
    """
    try:
        cuts = [int(word) for word in (options.cuts or ("1" if options.quick else "0,1,2,4")).split(",")]
    except ValueError:
        raise FedsplitError(f"--cuts {options.cuts} is no list of numbers; write e.g. 0,1,2.") from None
    defences = (options.defences or ("none,noise" if options.quick else ",".join(DEFENCES))).split(",")
    for name in defences:
        if name not in DEFENCES:
            raise FedsplitError(f"--defences names no '{name}'; known: {', '.join(DEFENCES)}.")
    return cuts, defences


def study(points: Scoreboard, asked: Request, jobs: int, keep: bool = False) -> int:
    """Train, attack, print and write, and keep the runs if `keep`; returns the exit code."""
    wanted = runs(points, asked)
    outcome = conduct({points.name: wanted}, asked, jobs, partial(print, flush=True), keep)
    results = Results.of(points, wanted, outcome.summaries)
    rows = undominated([row for arm in points.arms if (row := point(results, arm))])
    with (asked.out / "pareto.csv").open("w", newline="", encoding="utf-8") as target:
        writer = csv.DictWriter(target, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    if rows:
        drawn([as_point(row) for row in rows]).save(asked.out / "pareto.png")
    best = matched(rows)
    show(rows)
    if best:
        show(best, f"At most {POINTS:g} point of accuracy below no defence at the same cut: the safest of each")
    for name, why in outcome.failed.items():
        print(f"Failed: {name}: {why}")
    print(json.dumps({"rows": rows, "matched": best}))
    return 1 if outcome.failed else 0


def point(results: Results, arm: Arm) -> dict[str, Any] | None:
    """A row: means over the seeds that ended; None if none did."""
    done = results.of_arm("iid", arm.name)
    if not done:
        return None
    cut, defence, strength = arm.title.split("|")

    def mean(*names: str) -> float:
        return sum(float(summary[name]) for summary in done for name in names) / len(done)

    return {
        "cut": int(cut),
        "defence": defence,
        "strength": strength,
        "accuracy": mean("accuracy"),
        "worst_ssim": mean("worst_ssim"),
        "client_flops": mean("client_flops"),
        "bytes": mean("bytes_up", "bytes_down"),
        "seeds": len(done),
    }


def undominated(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `front`: whether no other is safer, more accurate and cheaper for clients."""
    return [{**row, "front": best} for row, best in zip(rows, unbeaten([as_point(row) for row in rows]), strict=True)]


def matched(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each defence at each cut the row of lowest SSIM within `POINTS` of no defence there; none where none is."""
    plain = {row["cut"]: row["accuracy"] for row in rows if row["defence"] == "none"}
    best: dict[tuple[int, str], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: float(row["worst_ssim"])):
        if row["cut"] in plain and row["accuracy"] >= plain[row["cut"]] - POINTS / 100:
            best.setdefault((row["cut"], row["defence"]), row)
    return sorted(best.values(), key=lambda row: (row["cut"], row["worst_ssim"]))


def as_point(row: Mapping[str, Any]) -> Point:
    """A row as a point of the picture."""
    figures = (float(row[name]) for name in ("accuracy", "worst_ssim", "client_flops"))
    return Point(str(row["defence"]), str(row["cut"]), *figures)


def show(rows: Sequence[dict[str, Any]], title: str = TITLE) -> None:
    """Print the table."""
    table = Table(title=title)
    for name in ("cut", "defence", "strength", "accuracy %", "worst SSIM", "client GFLOPs", "MB", ""):
        table.add_column(name, justify="left" if name == "defence" else "right")
    for row in rows:
        table.add_row(
            str(row["cut"]), row["defence"], row["strength"],
            f"{100 * row['accuracy']:.1f}", f"{row['worst_ssim']:.3f}",
            f"{row['client_flops'] / 1e9:.1f}", f"{row['bytes'] / 1e6:.1f}", "*" if row["front"] else "",
        )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    sys.exit(main())
