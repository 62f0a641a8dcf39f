"""PATROL (arXiv 2307.10981) beside other defences at equal front FLOPs, each attacked by `fedsplit audit`."""

from __future__ import annotations

from papers.scoreboard import Arm, Claim, Pairs, Partition, Scoreboard, Sizes

# Minutes of the whole scoreboard (`paper.py patrol --data FOLDER`, 2 jobs on 2 cores).
MINUTES: float | None = None

PATROL = "papers/patrol.toml"
# Four blocks of half their heads and MLP units cost about what two whole blocks do.
SHALLOW: Pairs = ("cut.front=2", "harden.keep-heads=1.0", "harden.keep-mlp=1.0", "harden.structures=")
DEEP: Pairs = ("cut.front=4", "harden.keep-heads=0.5", "harden.keep-mlp=0.5", "harden.structures=heads,mlp")
WHOLE: Pairs = ("cut.front=4", *SHALLOW[1:])
# The front is hardened once, and then frozen: penalties act on the hardening alone.
FROZEN: Pairs = ("train=body,tail", "front.penalties=")
OURS = "our bar: of the paper the public text has the qualitative claim alone"
MERGED: Pairs = ("front.merge.window=4",)
OTHERS = {
    "noise": ("Gaussian noise of the activations' spread", "noise", ("front.noise.scale=1",)),
    "feature-dropout": ("feature dropout of half", "feature-dropout", ("front.feature-dropout.keep=0.5",)),
    "shuffle": ("patch shuffling", "shuffle", ()),
    "quantize": ("2 bits", "quantize", ("front.quantize.bits=2",)),
    "bottleneck": ("16 channels", "bottleneck", ("front.bottleneck.rank=16",)),
    "merge": ("merging of 4 x 4 tokens", "merge", MERGED),
}


# A guard that draws anew for every upload is also attacked by the mean of a sample's uploads, one a round here.
ANEW = ("noise", "feature-dropout", "shuffle")
AVERAGED: Pairs = ("audit.attacks=closed-form,linear,rmle,inverse-net,averaged,labels", "audit.uploads=4")


def _arm(name: str, title: str, shape: Pairs, penalties: str = "", edits: str = "", pairs: Pairs = ()) -> Arm:
    attacks = AVERAGED if edits in ANEW else ()
    kept = tuple(pair for pair in shape if not pair.startswith("harden."))
    hardening = (*(pair for pair in shape if pair.startswith("harden.")), "train=all", f"front.penalties={penalties}")
    return Arm(
        f"patrol-{name}",
        title,
        PATROL,
        (*kept, f"front.edits={edits}", *pairs, *FROZEN),
        (),
        "",
        hardening,
        audit=attacks,
    )


ARMS = (
    _arm("none", "no defence, 2 blocks", SHALLOW),
    _arm("full", "PATROL: 4 blocks pruned by half", DEEP, "lipschitz,adversary"),
    _arm("full-merge", "PATROL, and merging of 4 x 4 tokens", DEEP, "lipschitz,adversary", "merge", MERGED),
    _arm("pruned", "pruned, no Lipschitz, no adversary", DEEP),
    _arm("pruned-merge", "merging of 4 x 4 tokens behind 4 blocks pruned by half", DEEP, "", "merge", MERGED),
    _arm("pruned-adversary", "PATROL without Lipschitz", DEEP, "adversary"),
    _arm("lipschitz", "Lipschitz, not pruned, 2 blocks", SHALLOW, "lipschitz"),
    _arm("adversary", "adversary only, 2 blocks", SHALLOW, "adversary"),
    _arm("linear-adversary", "linear adversary only, 2 blocks", SHALLOW, "linear-adversary"),
    _arm("nopeek", "NoPeek, 2 blocks", SHALLOW, "nopeek"),
    *(_arm(name, f"{title}, 2 blocks", SHALLOW, "", edit, pairs) for name, (title, edit, pairs) in OTHERS.items()),
    _arm("deep", "no defence, 4 whole blocks (twice the FLOPs)", WHOLE),
    _arm("deep-merge", "merging of 4 x 4 tokens behind 4 whole blocks (twice the FLOPs)", WHOLE, "", "merge", MERGED),
)
# No rival of PATROL at its cost: itself, or a front of another cost.
APART = ("patrol-full", "patrol-full-merge", "patrol-none", "patrol-deep", "patrol-deep-merge")

BOARD = Scoreboard(
    name="patrol",
    title="PATROL (arXiv 2307.10981)",
    arms=ARMS,
    partitions=(Partition("iid", "IID", ("data.partition=iid",)),),
    ablations=(),
    claims=(
        *(
            Claim(f"{title}: {text}", OURS, figure, arm, "patrol-none", **bound)
            for arm, title in (
                ("patrol-full", "PATROL"), ("patrol-merge", "merging"), ("patrol-full-merge", "PATROL and merging"),
                ("patrol-shuffle", "patch shuffling"), ("patrol-pruned-merge", "merging behind a pruned front"),
            )
            for text, figure, bound in (
                ("the strongest fresh attack below SSIM 0.3", "ssim", {"high": 0.3}),
                ("at most 1 point of accuracy lost", "accuracy_points", {"low": -1.0}),
                ("no more client FLOPs than without", "client_flops_ratio", {"high": 1.0}),
            )
        ),
        *(
            Claim(f"PATROL: ahead of {arm.title}", OURS, "ssim_gap", "patrol-full", arm.name, high=0.0)
            for arm in ARMS
            if arm.name not in APART
        ),
    ),
    reference="patrol-none",
    ablated=(),
    ablated_on=(),
    quick_partitions=("iid",),
    quick_ablations=(),
    quick_arms=("patrol-none", "patrol-full", "patrol-noise"),
    columns=("accuracy_points", "client_flops_ratio", "bytes_ratio", "worst_ssim", "worst_psnr", "worst_identified",
             "worst_labels_right", "rank1", "map"),
    notes=(
        "Every front is hardened for as long on as many images, with its defence or without; then it is frozen, and "
        "body and tail train in the federation.",
        "Hardening draws its images from the whole training set, the devices hold its first ones: few are in both.",
        "Attacks: suite 'quick' of fedsplit audit, attackers that know weights and defence, images of the test set; "
        "where the defence draws anew for every upload, also 'averaged', on the mean of four uploads of a sample.",
    ),
    hardening=("harden.images=2000", "harden.epochs=6", "harden.finetune-epochs=4", "front.nopeek.weight=1",
               "front.linear-adversary.weight=0.3", "front.linear-adversary.threshold=0.3"),
    quick_hardening=("harden.images=150", "harden.epochs=2", "harden.finetune-epochs=3", "data.limit=200",
                     "data.test-limit=100"),
    audit=("audit.victims=32",),
    retrieval=True,
    quick_audit=("audit.victims=8", "audit.images=64", "audit.attacks=closed-form,linear"),
    sizes=Sizes(
        images=("devices.count=10", "rounds=4", "data.limit=2000", "data.test-limit=1000", "optimizer.lr=0.001"),
        digits=("devices.count=10", "rounds=3"),
        quick=("devices.count=3", "rounds=1", "data.limit=150", "data.test-limit=100"),
    ),
    minutes=MINUTES,
)  # fmt: skip
