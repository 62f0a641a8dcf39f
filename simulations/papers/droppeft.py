"""DropPEFT (arXiv 2503.10217) beside the same LoRA in the same split without layer dropout."""

from __future__ import annotations

from papers.scoreboard import Arm, Claim, Partition, Scoreboard, Sizes

# Minutes of the whole scoreboard (`paper.py droppeft --data FOLDER`, 2 jobs on 2 cores).
MINUTES: float | None = None

# The learning rate, searched on CIFAR-10 without layer dropout, with a seed that is none of the scoreboard's (100).
TUNED = ("optimizer.lr=0.003",)

DROPPEFT = "papers/droppeft.toml"
BANDIT, PTLS = "control.tune=bandit", "share.partial=ptls"
PAPER = "stated in the paper's public text, against the state of the art"


def _arm(name: str, title: str, *pairs: str) -> Arm:
    return Arm(f"droppeft-{name}" if name else "droppeft", title, DROPPEFT, pairs, TUNED)


def _claims(arm: str, title: str) -> tuple[Claim, ...]:
    base = "droppeft-none"
    return (
        Claim(f"{title}: 1.3 to 6.3 times faster, modelled", PAPER, "virtual_speedup", arm, base, low=1.3),
        Claim(
            f"{title}: 1.3 to 6.3 times faster, measured", f"{PAPER}; here on a machine with other work",
            "wall_speedup", arm, base, low=1.3,
        ),
        Claim(f"{title}: 40 to 67 % less memory", PAPER, "round_peak_ratio", arm, base, high=0.6),
        Claim(
            f"{title}: more accuracy", "a summary, without a number: any gain is our reading", "accuracy_points",
            arm, base, above=0.0,
        ),
    )  # fmt: skip


ARMS = (
    _arm("none", "LoRA, no dropout", "body.plans="),
    _arm("", "dropout 0.5"),
    _arm("bandit", "dropout by bandit", BANDIT),
    # The same rates drawn anew every round: what the bandit gains over it, it gains by learning.
    _arm("rates", "rates at random", BANDIT, "control.bandit.epsilon=1", "control.bandit.decay=1"),
    _arm("ptls", "dropout 0.5, PTLS", PTLS),
    _arm("bandit-ptls", "by bandit, PTLS", BANDIT, PTLS),
)

BOARD = Scoreboard(
    name="droppeft",
    title="DropPEFT (arXiv 2503.10217)",
    arms=ARMS,
    # A modelled clock: a device, and the server for each client of a round, at 10 GFLOP/s as in the paper the body is
    # the device's; 10 MB/s each way. Every device holds out a fifth of its samples, which the bandit needs.
    pairs=(
        "cut.front=1", "cut.tail=0", "data.local-test=0.2", "eval.per-client=true",
        "devices.flops-per-s=1e10", "devices.server-flops-per-s=1e10",
        "devices.up-bytes-per-s=1e7", "devices.down-bytes-per-s=1e7",
    ),
    partitions=(Partition("dirichlet-0.5", "Dirichlet 0.5", ("data.partition=dirichlet", "data.alpha=0.5")),),
    ablations=(
        _arm("uniform", "uniform", "body.layerdrop.shape=uniform"),
        _arm("decreasing", "decreasing", "body.layerdrop.shape=decreasing"),
        _arm("bernoulli", "Bernoulli", "body.layerdrop.count=bernoulli"),
        _arm("no-recovery", "no recovery", "body.layerdrop.recover=0.0"),
        _arm("inverse", "inverse rescale", "body.layerdrop.rescale=inverse"),
        _arm("keep-none", "any block may drop", "body.layerdrop.keep=none"),
        _arm("rate-0.3", "rate 0.3", "body.layerdrop.rate=0.3"),
        _arm("rate-0.7", "rate 0.7, any block may drop", "body.layerdrop.rate=0.7", "body.layerdrop.keep=none"),
        _arm("knapsack", "and knapsack 0.6", "body.plans=layerdrop,knapsack", "body.knapsack.budget=0.6"),
    ),
    claims=(
        *_claims("droppeft", "dropout 0.5"),
        *_claims("droppeft-bandit", "bandit"),
        *(
            Claim(f"bandit: {text} than rates at random", "not in the paper: whether it learns", figure,
                  "droppeft-bandit", "droppeft-rates", above=least)
            for text, figure, least in (("sooner at the target", "virtual_speedup", 1.0),
                                        ("more accurate", "accuracy_points", 0.0))
        ),
        Claim(
            "dropout 0.5: the same memory in every round", "our reading: what must be there at once; the last "
            "rounds run in full (recover)", "server_peak_ratio", "droppeft", "droppeft-none", high=0.6,
        ),
    ),
    reference="droppeft-none",
    ablated=("droppeft",),
    ablated_on=("dirichlet-0.5",),
    quick_partitions=("dirichlet-0.5",),
    quick_arms=("droppeft-none", "droppeft", "droppeft-bandit", "droppeft-bandit-ptls"),
    quick_ablations=("droppeft-knapsack",),
    columns=("personal_accuracy", "virtual_speedup", "wall_speedup", "compute_speedup", "server_flops_ratio",
             "round_peak_ratio", "server_peak_ratio"),
    every_round=True,
    notes=(
        "LoRA, no dropout: FedPEFT in the same split. Ablations change one thing of dropout 0.5.",
        "The target is 0.95 of the last accuracy of the arm without dropout. Virtual seconds are modelled: every "
        "client and its body compute at 10 GFLOP/s and send at 10 MB/s.",
        "Wall seconds are noisy where other work shares the machine; they leave out the tests of the global model.",
        "Personal accuracy is another measure than accuracy: compare within its column. PTLS: personalised layers.",
    ),
    sizes=Sizes(
        # With 5 devices a round accuracy jumps by up to 9 points from round to round, and a time to a target is chance.
        images=("devices.count=20", "devices.per-round=10", "rounds=12", "data.limit=2000", "data.test-limit=1000"),
        digits=("devices.count=20", "devices.per-round=10", "rounds=12"),
        quick=("devices.count=4", "devices.per-round=2", "rounds=2", "data.limit=200", "data.test-limit=100"),
    ),
    minutes=MINUTES,
)  # fmt: skip
