"""D2FT (arXiv 2504.12471) beside all units in full, and beside random tables at the same cost."""

from __future__ import annotations

from papers.scoreboard import Arm, Claim, Partition, Scoreboard, Sizes

# Minutes of the whole scoreboard (`paper.py d2ft --data FOLDER`, 2 jobs on 2 cores).
MINUTES: float | None = None

# Learning rates, the best of those tried on CIFAR-10 with all units in full and a seed that is none of the
# scoreboard's (100), one run each: full fine-tuning 44.0, 51.3 and 45.3 % with 0.0003, 0.001 and 0.003;
# LoRA 46.9, 52.0 and 52.1 % with 0.001, 0.003 and 0.01.
TUNED = {"full": ("optimizer.lr=0.001",), "lora": ("optimizer.lr=0.003",)}

D2FT = "papers/d2ft.toml"
MODES = {"full": (), "lora": ("train=lora,head", "body.edits=lora")}
TITLES = {"full": "full", "lora": "LoRA"}
BUDGETS = (0.4, 0.6, 0.8)
RANDOM = ("body.knapsack.backward=random", "body.knapsack.forward=random")
PAPER = "stated in the paper's public text, for CIFAR-10, CIFAR-100 and Stanford Cars"
CARS = "stated in the paper's public text as 4 to 6 points, for Stanford Cars"
OURS = "not in the paper: the essential baseline, the same solver with random scores"


def _arm(mode: str, name: str, title: str, *pairs: str) -> Arm:
    reference = f"d2ft-{mode}"
    full = f"{reference}-{name}" if name else reference
    return Arm(full, f"{TITLES[mode]}, {title}", D2FT, (*MODES[mode], *pairs), TUNED[mode], reference)


def _arms(mode: str) -> tuple[Arm, ...]:
    return (
        _arm(mode, "", "all units", "body.plans="),
        *(_arm(mode, f"{b}", f"D2FT, compute {b}", f"body.knapsack.budget={b}") for b in BUDGETS),
        *(_arm(mode, f"random-{b}", f"random, compute {b}", f"body.knapsack.budget={b}", *RANDOM) for b in BUDGETS),
        _arm(mode, "traffic-0.5", "D2FT, traffic 0.5", "body.knapsack.by=communication", "body.knapsack.budget=0.5"),
    )


def _ablation(name: str, title: str, *pairs: str) -> Arm:
    """A change of D2FT at compute 0.6, the config's, with full fine-tuning."""
    return _arm("full", name, f"0.6, {title}", *(f"body.knapsack.{pair}" for pair in pairs))


def _claims(mode: str, points: float, source: str) -> tuple[Claim, ...]:
    own, base, said = f"d2ft-{mode}", f"d2ft-{mode}", TITLES[mode]
    return (
        Claim(f"{said}: 40 % less compute", PAPER, "server_flops_ratio", f"{own}-0.6", base, high=0.6),
        Claim(
            f"{said}: at most {points:g} points less accuracy for it", source, "accuracy_points",
            f"{own}-0.6", base, low=-points,
        ),
        Claim(
            f"{said}: 50 % less communication", f"{PAPER}; between the subnets, not between client and server",
            "traffic_ratio", f"{own}-traffic-0.5", base, high=0.5,
        ),
        Claim(
            f"{said}: at most {points:g} points less accuracy for that", source, "accuracy_points",
            f"{own}-traffic-0.5", base, low=-points,
        ),
        *(
            Claim(
                f"{said}: above a random table at compute {b}", OURS, "accuracy_points",
                f"{own}-{b}", f"{own}-random-{b}", above=0.0,
            )
            for b in BUDGETS
        ),
    )  # fmt: skip


BOARD = Scoreboard(
    name="d2ft",
    title="D2FT (arXiv 2504.12471)",
    arms=(*_arms("full"), *_arms("lora")),
    # The paper's setting is not federated: all devices, alike, in every round. One block at the client.
    pairs=("cut.front=1", "cut.tail=0"),
    partitions=(Partition("iid", "IID", ("data.partition=iid",)),),
    ablations=(
        _ablation("bi-level", "the paper's two stages", "choice=bi-level"),
        _ablation("gradient", "gradient magnitude", "backward=gradient", "forward=gradient"),
        _ablation("taylor", "first-order Taylor", "backward=taylor", "forward=taylor"),
        _ablation("mixed", "Fisher in full, magnitude forward", "forward=magnitude"),
        _ablation("anywhere", "FORWARD in any block", "placement=anywhere"),
        _ablation("nowhere", "no FORWARD", "placement=nowhere"),
        _ablation("block", "whole blocks", "units=block"),
        _ablation("capacities", "capacities 0.3, 0.6, 0.9", "capacities=0.3,0.6,0.9"),
        _ablation("refresh", "scored every round", "refresh=1"),
        # Of one knapsack for all: these scores do not tell micro-batches apart, so they need it.
        _ablation("one-fisher", "one knapsack, Fisher", "workers=1"),
        _ablation("one-magnitude", "one knapsack, magnitude", "workers=1", "backward=magnitude", "forward=magnitude"),
        _ablation("one-depth", "one knapsack, front to back", "workers=1", "backward=depth", "forward=depth"),
        _ablation("one-random", "one knapsack, random", "workers=1", "backward=random", "forward=random"),
    ),
    claims=(*_claims("full", 2.0, PAPER), *_claims("lora", 6.0, CARS)),
    reference="d2ft-full",
    ablated=("d2ft-full-0.6", "d2ft-full-random-0.6"),
    ablated_on=("iid",),
    quick_partitions=("iid",),
    quick_arms=("d2ft-full", "d2ft-full-0.6", "d2ft-full-random-0.6", "d2ft-lora", "d2ft-lora-0.6"),
    quick_ablations=("d2ft-full-one-depth",),
    columns=("accuracy_points", "server_flops_ratio", "compute_ratio", "traffic_ratio", "round_peak_ratio",
             "workload_variance"),
    notes=(
        "Seven of eight blocks are the server's and planned. All micro-batches are of equal size.",
        "Traffic between client and server is what it is without plans: D2FT does not reduce it.",
    ),
    sizes=Sizes(
        images=("devices.count=10", "rounds=5", "data.limit=2000", "data.test-limit=1000"),
        digits=("devices.count=7", "rounds=5", "data.limit=1400"),
        quick=("devices.count=4", "devices.per-round=2", "rounds=2", "data.limit=160", "data.test-limit=100",
               "local.batch-size=8"),
    ),
    minutes=MINUTES,
)  # fmt: skip
