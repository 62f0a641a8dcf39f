"""From the summaries of runs to the rows of a table and the verdicts on a paper's claims."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsplit.config import Config
from fedsplit.runs import RunFolder
from fedsplit.sweep.table import mean, spread
from papers.scoreboard import Claim, Run, Scoreboard

LAST = 5  # rounds whose personalised accuracy counts: few clients, with few samples each, are tested in one

Summary = Mapping[str, Any]
Measure = Callable[[Summary, Summary, float], float]


def ratio_of(name: str) -> Measure:
    """The ratio of a summary's figure `name`."""
    return lambda own, base, target: float(own[name] / base[name])


def speedup(name: str) -> Measure:
    """How many times sooner, by the sum of `name` over rounds, `target` times the base's last accuracy is reached.

    A run that never reaches it has 0.
    """

    def measure(own: Summary, base: Summary, target: float) -> float:
        wanted = target * base["accuracy"]
        spent = until(own, name, wanted)
        return (until(base, name, wanted) or 0.0) / spent if spent else 0.0

    return measure


def fewer_bytes(own: Summary, base: Summary, target: float) -> float:
    """How many times fewer bytes a run sends, both ways, until its global model has the board's goal.

    The goal is the same for all arms: `target` times the last accuracy of the board's reference. A run that never
    has it has 0; beside a base that never has it all bytes of the base count, so the figure is then too small.
    """
    spent = until(own, "bytes", own["goal"])
    return (until(base, "bytes", base["goal"]) or sent_bytes(base)) / spent if spent else 0.0


# A run's figure beside another run's, of the same partition and seed; the last argument is the board's target.
FIGURES: dict[str, Measure] = {
    "client_flops_ratio": ratio_of("client_flops"),
    "server_flops_ratio": ratio_of("server_flops"),
    "compute_ratio": lambda own, base, target: compute(own) / compute(base),
    "server_peak_ratio": ratio_of("server_peak_bytes"),
    "round_peak_ratio": ratio_of("round_peak_bytes"),
    "traffic_ratio": ratio_of("traffic"),
    "bytes_ratio": lambda own, base, target: sent_bytes(own) / sent_bytes(base),
    "accuracy_points": lambda own, base, target: 100 * (own["accuracy"] - base["accuracy"]),
    "bytes_speedup": fewer_bytes,
    "virtual_speedup": speedup("virtual_s"),
    "wall_speedup": speedup("clients_s"),
    "compute_speedup": speedup("server_flops"),
    # Of audits: what an attacker finds of this run, and how much more than of the other.
    "ssim": lambda own, base, target: float(own["worst_ssim"]),
    "ssim_gap": lambda own, base, target: float(own["worst_ssim"] - base["worst_ssim"]),
}


@dataclass(frozen=True)
class Results:
    """The summaries of the runs that ended well, by (partition, arm, seed), and all seeds that were asked for."""

    summaries: Mapping[tuple[str, str, int], Summary]
    seeds: Sequence[int]
    target: float = 0.95

    @classmethod
    def of(cls, board: Scoreboard, runs: Sequence[Run], summaries: Mapping[str, Summary]) -> Results:
        """Those of `runs` among `summaries`, which are by the run's name."""
        done = {(run.partition, run.arm, run.seed): summaries[run.name] for run in runs if run.name in summaries}
        goals = {
            (partition, seed): board.target * summary["accuracy"]
            for (partition, arm, seed), summary in done.items()
            if arm == board.reference
        }
        done = {name: {**summary, "goal": goals.get((name[0], name[2]), math.inf)} for name, summary in done.items()}
        return cls(done, sorted({run.seed for run in runs}), board.target)

    def of_arm(self, partition: str, arm: str) -> list[Summary]:
        """The summaries of an arm, a seed each."""
        found = (self.summaries.get((partition, arm, seed)) for seed in self.seeds)
        return [summary for summary in found if summary is not None]

    def beside(self, figure: str, partition: str, arm: str, against: str) -> list[float]:
        """A figure of `FIGURES` for every seed that both arms have."""
        measure, done = FIGURES[figure], self.summaries
        pairs = [(done.get((partition, arm, seed)), done.get((partition, against, seed))) for seed in self.seeds]
        return [measure(own, base, self.target) for own, base in pairs if own is not None and base is not None]


def compute(summary: Summary) -> float:
    """FLOPs of clients and server, all rounds."""
    return float(summary["client_flops"] + summary["server_flops"])


def until(summary: Summary, name: str, accuracy: float) -> float | None:
    """The sum of `name` up to the first round after which the global model has `accuracy`; None if it never has."""
    done = 0.0
    for row in summary["curve"]:
        done += float(row[name])
        if row["accuracy"] is not None and row["accuracy"] >= accuracy:
            return done
    return None


def sent_bytes(summary: Summary) -> int:
    """Bytes on the wire, all clients and rounds, both ways."""
    return int(summary["bytes_up"] + summary["bytes_down"])


def row(board: Scoreboard, results: Results, partition: str, arm: str) -> dict[str, Any]:
    """One row: accuracy over the seeds, ratios to the reference seed by seed, the rest as means a seed."""
    done = results.of_arm(partition, arm)
    accuracy = [summary["accuracy"] for summary in done]
    figures = ["client_flops_ratio", "bytes_ratio", *(name for name in board.columns if name in FIGURES)]
    ratios = {name: mean(results.beside(name, partition, arm, board.against(arm))) for name in figures}
    plain = ["client_flops", "kept_samples", *(name for name in board.columns if name not in FIGURES)]
    return {
        "method": board.name,
        "arm": arm,
        "against": board.against(arm),
        "partition": partition,
        "accuracy_mean": mean(accuracy),
        "accuracy_std": spread(accuracy),
        "seeds": len(done),
        "failed": len(results.seeds) - len(done),
        **ratios,
        "bytes": mean([sent_bytes(summary) for summary in done]),
        **{name: mean([summary[name] for summary in done if summary.get(name) is not None]) for name in plain},
    }


def judge(board: Scoreboard, claim: Claim, results: Results, partition: str, model: str) -> dict[str, Any]:
    """A claim on one partition: the paper's bound, our mean and spread, and by how much it is missed."""
    values = results.beside(claim.figure, partition, claim.arm, claim.against)
    ours = mean(values)
    bounds = (("≥", claim.low), (">", claim.above), ("≤", claim.high))
    relation, bound = next((sign, limit) for sign, limit in bounds if limit is not None)
    return {
        "method": board.name,
        "claim": claim.text,
        "source": claim.source,
        "note": _note(claim, model),
        "partition": partition,
        "figure": claim.figure,
        "relation": relation,
        "claimed": bound,
        "published_for": claim.published_for,
        "ours": ours,
        "ours_std": spread(values),
        "seeds": len(values),
        "holds": None if ours is None else holds(claim, ours),
        "verdict": "not measured: a run failed" if ours is None else verdict(claim, ours, bound),
    }


def holds(claim: Claim, ours: float) -> bool:
    """Whether a figure is within the claim's bounds."""
    return (
        (claim.low is None or ours >= claim.low)
        and (claim.above is None or ours > claim.above)
        and (claim.high is None or ours <= claim.high)
    )


def verdict(claim: Claim, ours: float, bound: float) -> str:
    """'holds', or by how much it is missed: as a factor for ratios and speed-ups, else as a difference."""
    if holds(claim, ours):
        return "holds"
    if claim.figure.endswith(("_ratio", "_speedup")):
        return f"missed: {ours / bound:.3g} times the claim"
    unit = " points" if claim.figure.endswith("_points") else ""
    return f"missed by {abs(ours - bound):.2f}{unit}"


def claimed_on(claim: Claim, cells: Sequence[tuple[str, str]]) -> list[str]:
    """The partitions on which a claim is judged, of the (partition, arm) that were to run: where both arms were."""
    arms: dict[str, set[str]] = {}
    for partition, arm in cells:
        arms.setdefault(partition, set()).add(arm)
    wanted = {claim.arm, claim.against}
    return [name for name, its in arms.items() if wanted <= its and (not claim.partitions or name in claim.partitions)]


def _note(claim: Claim, model: str) -> str:
    """For which backbone the number is published, and whether ours is another."""
    if not claim.published_for:
        return ""
    backbone = {"vit_base": "ViT-Base", "vit_large": "ViT-Large"}.get("_".join(model.split("_")[:2]), "")
    published = f"published for {claim.published_for}"
    same = backbone and backbone in claim.published_for
    return published if same else f"{published}; no published figure for {model}"


def of_tables(folder: RunFolder, config: Config) -> dict[str, Any]:
    """What the tables of a finished run say beside its summary; nothing where there are none.

    `curve` has a row a round: accuracy (None if not tested), its bytes both ways, its virtual seconds, the seconds its
    clients worked, and the server's FLOPs. `round_peak_bytes` is the server's peak in a client's round, their mean.
    `traffic` is what the body's subnets would send if each had a machine of its own (2 for a unit in full, 1 for one
    that runs forward only), over that of all in full.
    """
    rounds = folder.rows("rounds")
    # Tables of runs before there was a clock with deadlines have no column 'late': nobody was.
    clients = [row for row in folder.rows("clients") if not (row["failure"] or row.get("late"))]
    if not rounds:
        return {}
    worked: dict[str, float] = {}
    for row in clients:
        worked[row["round"]] = worked.get(row["round"], 0.0) + float(row["wall_s"])
    curve = [
        {
            "accuracy": _number(row["accuracy"]),
            "bytes": float(row["bytes_up"]) + float(row["bytes_down"]),
            "virtual_s": float(row["virtual_s"]),
            "clients_s": worked.get(row["round"], 0.0),
            "server_flops": float(row["server_flops"]),
        }
        for row in rounds
    ]
    return {
        "curve": curve,
        "round_peak_bytes": mean([float(row["server_peak_bytes"]) for row in clients]),
        "traffic": _traffic(folder, config),
        "workload_variance": mean(_numbers(rounds, "workload_variance")),
        "gradient_cosine": mean(_numbers(rounds, "gradient_cosine")),
        "personal_accuracy": mean(_numbers(rounds, "personal_accuracy")[-LAST:]),
    }


def _traffic(folder: RunFolder, config: Config) -> float:
    rows = folder.rows("units")
    depth = max((int(row["block"]) for row in rows), default=-1) + 1
    body = [row for row in rows if config.cut.front <= int(row["block"]) < depth - config.cut.tail]
    sent = sum(2 * int(row["full"]) + int(row["forward"]) for row in body)
    most = sum(2 * (int(row["full"]) + int(row["forward"]) + int(row["skip"])) for row in body)
    return sent / most if most else 1.0


def _numbers(rows: Sequence[Mapping[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name)]


def _number(text: str) -> float | None:
    return float(text) if text else None
