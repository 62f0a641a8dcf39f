"""How much of its update a device sends: by how much it has to say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fedsplit.control.facts import Facts
from fedsplit.control.told import rows_of, scatter, told
from fedsplit.rng import numpy_rng
from fedsplit.types import FedsplitError, Scalar, knob

KEEP = "wire.topk.keep"
Counts = Sequence[float]


@dataclass(frozen=True)
class Importance:
    """Lets devices with many samples and an even mixture of labels send more of their update.

    Before the first round every device says how many samples it has and, by `labels`, how many of each class. With
    D the divergence KL(labels || reference), device i has C = weight n_i / max n + (1 - weight) exp(-D). All N
    devices are ranked by C, the highest first, equal ones by id; rank k drops the share
    low + (high - low) k / N of its update: `wire.topk.keep` is the rest.

    Paper: arXiv 2412.19989 (Caesar), eq. 10 and its bounds; the weight and the volume term are from a
        re-implementation.
    Place: control.tune.
    Off: low = high = 0.
    Deviates: the label term is not in its public text: exp(-KL) is ours (our card, step 0). Noisy counts and volume
        alone are ours, too: exact counts tell the server a device's label distribution.
    """

    low: float = knob(0.1, "share of an update that the most important device drops, about", low=0.0, high=1.0)
    high: float = knob(0.6, "share of an update that the least important device drops", low=0.0, high=1.0)
    weight: float = knob(0.5, "weight of the number of samples against the labels' evenness", low=0.0, high=1.0)
    labels: str = knob(
        "counts", "what a device says of its labels: their 'counts', 'noisy' counts, or 'none': volume alone decides",
        choices=("counts", "noisy", "none"),
    )  # fmt: skip
    epsilon: float = knob(1.0, "privacy of noisy counts: Laplace noise of scale 1 / epsilon on each", above=0.0)
    reference: str = knob(
        "uniform", "what labels should be like: 'uniform' over the classes, or 'global', all devices' together",
        choices=("uniform", "global"),
    )  # fmt: skip

    keys: ClassVar[tuple[str, ...]] = (KEEP,)
    columns: ClassVar[tuple[str, ...]] = ("round", "client", "importance", "rank", "keep")

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise FedsplitError(f"low={self.low:g} is more than high={self.high:g}; low drops less.")

    @property
    def choices(self) -> tuple[dict[str, Scalar], ...]:
        """The ends of what it may choose."""
        return {KEEP: 1 - self.high}, {KEEP: 1 - self.low}

    def reveal(self, counts: Counts, key: int) -> tuple[float, ...]:
        """What a device with `counts` samples of each class says of them; runs on the device, once."""
        if self.labels == "none":
            return ()
        if self.labels == "counts":
            return tuple(float(count) for count in counts)
        noise = numpy_rng(key).laplace(0.0, 1 / self.epsilon, len(counts))
        return tuple(max(0.0, float(count + more)) for count, more in zip(counts, noise, strict=True))

    def assign(
        self, facts: Facts, memory: Mapping[str, Any], key: int
    ) -> tuple[dict[int, dict[str, Scalar]], dict[str, Any]]:
        """The value of `keys` for every client of the round, and new memory: what the first proposal ranked."""
        scores = memory.get("scores") or self.scores(facts.samples, facts.labels)
        ranks = ranked(scores)
        keep = {client: 1 - self.ratio(ranks[client], len(ranks)) for client in facts.clients}
        rows = [
            {"client": client, "importance": scores[client], "rank": ranks[client], "keep": value}
            for client, value in keep.items()
        ]
        choices: dict[int, dict[str, Scalar]] = {client: {KEEP: value} for client, value in keep.items()}
        return choices, told({**memory, "scores": scores}, facts.round, rows)

    def scores(self, samples: Sequence[int], labels: Sequence[Counts]) -> list[float]:
        """The importance C of every device, with `samples` of which `labels` are said to be of each class."""
        volume = [count / max(samples) for count in samples]
        if self.labels == "none":
            return volume
        wanted: Counts = [sum(column) for column in zip(*labels, strict=True)]
        if self.reference == "uniform":
            wanted = [1.0] * len(wanted)
        evenness = [math.exp(-divergence(counts, wanted)) for counts in labels]
        return [self.weight * v + (1 - self.weight) * e for v, e in zip(volume, evenness, strict=True)]

    def ratio(self, rank: int, devices: int) -> float:
        """The share of its update that the device of `rank` (from 1) of `devices` drops: eq. 10."""
        return self.low + (self.high - self.low) / devices * rank

    def rows(self, memory: Mapping[str, Any], round: int) -> list[dict[str, Any]]:
        """What choices.csv says of round `round`, one row a client."""
        return rows_of(memory, round)

    def draw(self, rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
        """Plot the kept share of every client over rounds; returns `path`."""
        return scatter(rows, "keep", "update's values sent (fraction)", path)


def ranked(scores: Sequence[float]) -> list[int]:
    """The rank of every device, 1 for the highest score; of equal ones the lower id comes first."""
    order = sorted(range(len(scores)), key=lambda device: (-scores[device], device))
    ranks = [0] * len(scores)
    for rank, device in enumerate(order, 1):
        ranks[device] = rank
    return ranks


def divergence(counts: Counts, reference: Counts) -> float:
    """KL(counts || reference) of two distributions over the same classes, given as counts, in nats.

    A device whose counts are all 0, as noise may leave them, tells nothing: 0. No class may be counted that the
    reference lacks.
    """
    total, whole = sum(counts), sum(reference)
    if not total:
        return 0.0
    pairs = ((count / total, other / whole) for count, other in zip(counts, reference, strict=True) if count)
    return max(0.0, sum(p * math.log(p / q) for p, q in pairs))
