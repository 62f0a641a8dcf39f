"""The five papers together (configs/combos/all.toml) beside FedAvg full fine-tuning, on the same mixed fleet.

    python simulations/all.py [--data FOLDER] [--public FOLDER] [--arms NAME,...] [--seeds N] [--jobs N] [--out DIR]
        [--quick]

Aim: within 2 points of FedAvg full fine-tuning at a tenth of its bytes and of its client FLOPs or less, and an SSIM
below 0.3 for the strongest attack of `fedsplit audit`. Every other arm leaves one piece out, and tells what that piece
gives or costs. The front is hardened and pruned beforehand, on the images of --public, or, without it, on images of
the training set that the devices may hold too. With --out runs that are there stay. Prints the tables and the aims,
and one line of JSON last: `accuracy_gap` (FedAvg's accuracy less ours, in points), `bytes_ratio`,
`client_flops_ratio`, `worst_ssim`, `aims` and `rows`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import paper
from papers.conduct import add_options, conduct, folder, request, took
from papers.figures import Results, mean
from papers.scoreboard import Arm, Claim, Pairs, Partition, Request, Scoreboard, Sizes, runs

from fedsplit.types import FedsplitError

ALL = "combos/all.toml"
# The whole model trains where the front is hardened, without what belongs to the federation.
PLAIN: Pairs = (
    "train=all", "front.edits=merge", "body.edits=", "body.plans=", "data.select=", "local.phases=", "control.tune=",
    "share.merge=fedavg", "local.head=auto", "optimizer.lr=0.0005", "front.penalties=lipschitz,adversary",
    "front.lipschitz.alpha=0.003", "front.adversary.beta=1", "harden.structures=heads,mlp", "harden.keep-heads=0.75",
    "harden.keep-mlp=0.75", "local.epochs=1",
)  # fmt: skip
OURS = "our aim; no paper has all five"
AIMS = (
    Claim("within 2 points of FedAvg's accuracy", OURS, "accuracy_points", "all", "fedavg", low=-2.0),
    Claim("a tenth of its bytes or less", OURS, "bytes_ratio", "all", "fedavg", high=0.1),
    Claim("a tenth of its client FLOPs or less", OURS, "client_flops_ratio", "all", "fedavg", high=0.1),
    Claim("the strongest attack below SSIM 0.3", OURS, "ssim", "all", "fedavg", high=0.3),
)
# What is left out, by its paper: the name, a line of the table, pairs, and in what its front is hardened in another
# way; None is a front as shipped.
WITHOUT: tuple[tuple[str, str, Pairs, Pairs | None], ...] = (
    ("harden", "PATROL: the front as shipped", (), None),
    ("merge", "merging of tokens", ("front.edits=prompts",), ("front.edits=",)),
    ("prompts", "SFPrompt: prompts", ("front.edits=merge", "train=lora,head"), ()),
    ("el2n", "SFPrompt: EL2N, all samples kept", ("data.select=",), ()),
    (
        "local", "SFPrompt: the local phase",  # the tail that scores samples is its work: as many at random
        ("local.phases=", "local.head=auto", "data.select=random", "data.random.keep=0.9"), (),
    ),
    ("lora", "adapters: the body frozen", ("train=prompts,head", "body.edits=", "body.plans="), ()),
    ("d2ft", "D2FT: units by their scores", ("body.plans=layerdrop",), ()),
    ("droppeft", "DropPEFT: blocks at random", ("body.plans=knapsack",), ()),
    ("caesar", "Caesar: coded parameters", ("control.tune=", "wire.parameters-down=", "wire.parameters-up="), ()),
    (
        "codecs", "codecs of activations and gradients",
        ("wire.activations-up=", "wire.activations-down=", "wire.gradients-up=", "wire.gradients-down="), (),
    ),
)  # fmt: skip
# They send the same pictures through the same front and codecs as all together: audits differ in the third digit.
ALIKE = ("el2n", "local", "lora", "d2ft", "droppeft", "caesar")
FEDAVG: Pairs = (
    "train=all", "cut.shape=none", "cut.pool=tail", "front.edits=", "data.select=", "local.phases=", "local.head=auto",
    "body.edits=", "body.plans=", "control.tune=", "share.merge=fedavg", "optimizer.lr=0.0003",
    *(f"wire.{kind}-{way}=" for kind in ("activations", "gradients", "parameters") for way in ("up", "down")),
)  # fmt: skip


def board(public: str) -> Scoreboard:
    """FedAvg, all together, and all but one, as a scoreboard; fronts are hardened on `public` if it is given."""
    hard = (*PLAIN, *((f"data.source={public}",) if public else ()))
    whole = Arm("all", "all together", ALL, (), (), "", hard)
    others = tuple(
        Arm(
            f"no-{name}", f"without {title}", ALL, pairs, (), "", (*hard, *more) if more else None,
            "all" if more == () else "", name not in ALIKE,
        )
        for name, title, pairs, more in WITHOUT
    )  # fmt: skip
    return Scoreboard(
        name="all",
        title="The five papers together",
        arms=(Arm("fedavg", "FedAvg, full fine-tuning", ALL, FEDAVG), whole, *others),
        partitions=(Partition("dirichlet-0.5", "Dirichlet 0.5", ("data.partition=dirichlet", "data.alpha=0.5")),),
        ablations=(),
        claims=AIMS,
        reference="fedavg",
        ablated=(),
        ablated_on=(),
        quick_partitions=("dirichlet-0.5",),
        quick_ablations=(),
        quick_arms=("fedavg", "all", "no-caesar"),
        columns=("accuracy_points", "client_flops_ratio", "bytes_ratio", "compute_ratio", "virtual_s", "energy_j",
                 "worst_ssim", "worst_labels_right"),
        notes=("Attacks: suite 'quick' of fedsplit audit, of all together and of arms that send something else; FedAvg "
               "sends no activations.",),
        hardening=("harden.images=10000", "harden.epochs=2", "harden.finetune-epochs=1"),
        quick_hardening=("harden.images=150", "harden.epochs=2", "harden.finetune-epochs=3", "data.limit=200",
                         "data.test-limit=100", "harden.batch-size=32"),
        audit=("audit.victims=32",),
        quick_audit=("audit.victims=8", "audit.images=64", "audit.attacks=closed-form,linear"),
        sizes=Sizes(
            images=("rounds=30", "data.limit=3000", "data.test-limit=1000"),
            digits=("devices.count=20", "rounds=10"),
            quick=("devices.count=5", "devices.per-round=3", "rounds=2", "data.limit=150", "data.test-limit=80"),
        ),
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for and print it; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        public = folder_of_images(options.public) if options.public else ""
        with folder(options.out) as out:
            return study(board(public), request(options, out, arms=options.arms), options.jobs, options.record)
    except FedsplitError as error:
        print(f"all.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("all.py: stopped", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--public", metavar="FOLDER", help="other images, on which the front is hardened")
    made.add_argument("--arms", default="", metavar="NAME,...", help="these alone, beside fedavg: all, no-harden, ...")
    add_options(made)
    return made


def folder_of_images(text: str) -> str:
    """The folder, as `data.source` takes it.

    Raises:
        FedsplitError: it holds no images.
    """
    path = Path(text).expanduser().resolve()
    if not (path / "train.parquet").is_file():
        raise FedsplitError(f"--public {text}: there is no train.parquet; it needs train.parquet and test.parquet.")
    return str(path)


def study(whole: Scoreboard, asked: Request, jobs: int, keep: bool = False) -> int:
    """Run, judge, print and write, and keep the runs if `keep`; returns the exit code."""
    begun = time.monotonic()
    wanted = runs(whole, asked)
    outcome = conduct({whole.name: wanted}, asked, jobs, partial(print, flush=True), keep)
    results = Results.of(whole, wanted, outcome.summaries)
    sheets, rows, claims = paper.tables(whole, asked, results)
    minutes = (time.monotonic() - begun) / 60
    foot = [*(f"Failed: {name}: {why}" for name, why in outcome.failed.items()), took(minutes, jobs, asked, outcome)]
    paper.show(whole, asked, wanted[0], sheets, foot)
    print(json.dumps({**figures(whole, results), "aims": claims, "rows": rows, "minutes": round(minutes, 2)}))
    return 1 if outcome.failed else 0


def figures(whole: Scoreboard, results: Results) -> dict[str, float | None]:
    """What was reached, means over the seeds: points lost, ratios to FedAvg, SSIM of the strongest attack."""
    place = whole.partitions[0].name

    def beside(figure: str) -> float | None:
        return mean(results.beside(figure, place, "all", whole.reference))

    points = beside("accuracy_points")
    return {
        "accuracy_gap": None if points is None else -points,
        "bytes_ratio": beside("bytes_ratio"),
        "client_flops_ratio": beside("client_flops_ratio"),
        "worst_ssim": beside("ssim"),
    }


if __name__ == "__main__":
    sys.exit(main())
