"""From the summaries of runs to the rows of a table and the verdicts on a paper's claims."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from papers.scoreboard import Claim, Run, Scoreboard

Summary = Mapping[str, Any]

# A run's figure beside another run's, of the same partition and seed.
FIGURES: dict[str, Callable[[Summary, Summary], float]] = {
    "client_flops_ratio": lambda own, base: own["client_flops"] / base["client_flops"],
    "bytes_ratio": lambda own, base: sent_bytes(own) / sent_bytes(base),
    "accuracy_points": lambda own, base: 100 * (own["accuracy"] - base["accuracy"]),
}


@dataclass(frozen=True)
class Results:
    """The summaries of the runs that ended well, by (partition, arm, seed), and all seeds that were asked for."""

    summaries: Mapping[tuple[str, str, int], Summary]
    seeds: Sequence[int]

    @classmethod
    def of(cls, runs: Sequence[Run], summaries: Mapping[str, Summary]) -> Results:
        """Those of `runs` among `summaries`, which are by the run's name."""
        done = {(run.partition, run.arm, run.seed): summaries[run.name] for run in runs if run.name in summaries}
        return cls(done, sorted({run.seed for run in runs}))

    def of_arm(self, partition: str, arm: str) -> list[Summary]:
        """The summaries of an arm, a seed each."""
        found = (self.summaries.get((partition, arm, seed)) for seed in self.seeds)
        return [summary for summary in found if summary is not None]

    def beside(self, figure: str, partition: str, arm: str, against: str) -> list[float]:
        """A figure of `FIGURES` for every seed that both arms have."""
        measure, done = FIGURES[figure], self.summaries
        pairs = [(done.get((partition, arm, seed)), done.get((partition, against, seed))) for seed in self.seeds]
        return [measure(own, base) for own, base in pairs if own is not None and base is not None]


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return statistics.fmean(values) if values else None


def spread(values: Sequence[float]) -> float | None:
    """The sample standard deviation (n - 1); None of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def sent_bytes(summary: Summary) -> int:
    """Bytes on the wire, all clients and rounds, both ways."""
    return int(summary["bytes_up"] + summary["bytes_down"])


def row(board: Scoreboard, results: Results, partition: str, arm: str) -> dict[str, Any]:
    """One row: accuracy over the seeds, ratios to the reference seed by seed, the rest as means a seed."""
    done = results.of_arm(partition, arm)
    accuracy = [summary["accuracy"] for summary in done]
    ratios = {
        name: mean(results.beside(name, partition, arm, board.reference))
        for name in ("client_flops_ratio", "bytes_ratio")
    }
    return {
        "method": board.name,
        "arm": arm,
        "partition": partition,
        "accuracy_mean": mean(accuracy),
        "accuracy_std": spread(accuracy),
        "seeds": len(done),
        "failed": len(results.seeds) - len(done),
        **ratios,
        "client_flops": mean([summary["client_flops"] for summary in done]),
        "bytes": mean([sent_bytes(summary) for summary in done]),
        "kept_samples": mean([summary["kept_samples"] for summary in done]),
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
    """'holds', or by how much it is missed: as a factor for ratios, in points for accuracy."""
    if holds(claim, ours):
        return "holds"
    if claim.figure.endswith("_ratio"):
        return f"missed: {ours / bound:.3g} times the claim"
    return f"missed by {abs(ours - bound):.2f} points"


def claimed_on(claim: Claim, partitions: Sequence[str]) -> list[str]:
    """The partitions, of those that were run, on which a claim is judged."""
    return [name for name in partitions if not claim.partitions or name in claim.partitions]


def _note(claim: Claim, model: str) -> str:
    """For which backbone the number is published, and whether ours is another."""
    if not claim.published_for:
        return ""
    backbone = {"vit_base": "ViT-Base", "vit_large": "ViT-Large"}.get("_".join(model.split("_")[:2]), "")
    published = f"published for {claim.published_for}"
    same = backbone and backbone in claim.published_for
    return published if same else f"{published}; no published figure for {model}"
