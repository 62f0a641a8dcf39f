"""Caesar's codecs, and plainer ones, on the activations and gradients of SFPrompt: bytes to the same accuracy."""

from __future__ import annotations

from papers.scoreboard import Arm, Partition, Scoreboard, Sizes

# Minutes of the whole scoreboard (`paper.py caesar-split --data FOLDER`, 2 jobs on 2 cores).
MINUTES: float | None = None


def _arm(name: str, title: str, up: str = "", down: str = "", *more: str) -> Arm:
    pairs = (f"wire.activations-up={up}", f"wire.gradients-down={down}", *more)
    return Arm(f"wire-{name}" if name else "wire", title, "papers/sfprompt.toml", pairs, ("optimizer.lr=0.01",))


BOARD = Scoreboard(
    name="caesar-split",
    title="Caesar's codecs on SFPrompt's activations and gradients",
    arms=(
        _arm("", "SFPrompt, float32"),
        _arm("half", "half precision", "half", "half"),
        _arm("int8", "8 bits a token", "int8", "int8"),
        _arm("int8-zstd", "8 bits a token, entropy-coded", "int8,zstd", "int8,zstd"),
        _arm("qsgd", "QSGD, 15 levels", "qsgd", "qsgd", "wire.qsgd.levels=7"),
        _arm("topk", "top-k, Caesar's upload (keep 0.4)", "topk", "topk", "wire.topk.keep=0.4"),
        _arm("recover", "largest exactly, of the others the sign: Caesar's download (keep 0.4)", "recover", "recover"),
        _arm("caesar", "Caesar's: up as its uploads, down as its downloads", "topk", "recover", "wire.topk.keep=0.4"),
        _arm("token-topk-int8", "a quarter of each token in 8 bits", "token-topk,int8", "token-topk,int8"),
        _arm("sign", "signs and a mean", "sign", "sign"),
    ),
    partitions=(Partition("iid", "IID", ("data.partition=iid",)),),
    ablations=(),
    claims=(),
    pairs=("cut.front=0", "cut.tail=0"),
    reference="wire",
    ablated=(),
    ablated_on=(),
    quick_partitions=("iid",),
    quick_ablations=(),
    quick_arms=("wire", "wire-int8", "wire-caesar"),
    columns=("accuracy_points", "bytes_ratio", "bytes_speedup"),
    every_round=True,
    target=0.95,
    notes=(
        "The target is 0.95 of the last accuracy without codecs. Of activations and gradients there is no stale copy "
        "to recover from: the same image comes again with other prompts.",
        "Codecs are on activations up and gradients down; activations down are pooled, and a few bytes.",
    ),
    sizes=Sizes(
        images=("devices.count=20", "devices.per-round=5", "rounds=20", "data.limit=2000", "data.test-limit=1000"),
        digits=("devices.count=10", "devices.per-round=5", "rounds=10"),
    ),
    minutes=MINUTES,
)  # fmt: skip
