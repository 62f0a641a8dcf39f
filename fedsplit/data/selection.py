"""Sample selectors: which samples of a device are worth training on.

A selector scores a device's samples, on the device, and keeps a band of the scores. Whatever its
settings, a device with samples keeps at least one. The server learns which samples were kept, by
their activations: a selector of hard samples uploads the most identifying ones.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsplit import choose
from fedsplit.types import FedsplitError, knob


class Samples(Protocol):
    """What a selector may see of a device's S samples; nothing of it leaves the device."""

    @property
    def labels(self) -> Tensor:
        """The labels (S,) int64."""
        ...

    @property
    def classes(self) -> int:
        """K, the number of classes of the task."""
        ...

    def logits(self) -> Tensor:
        """(S, K) float32 on the CPU: front joined to tail, the body skipped, in evaluation mode,
        with the current parameters; computed when first asked for.
        """
        ...

    def features(self) -> Tensor:
        """(S, C) float32 on the CPU: the mean over the patch tokens of the front's output."""
        ...


class Selector(Protocol):
    """A sample selector. `scores_model`: whether `score` asks the model (a forward pass over the samples).

    The caller averages `score` over the ends of the last `epochs` epochs of the local phase, and
    with `once` keeps the mask of a device's first round for the whole run.
    """

    scores_model: ClassVar[bool]

    @property
    def keep(self) -> float:
        """The kept fraction in (0, 1]; 1.0 is off."""
        ...

    @property
    def offset(self) -> float:
        """The fraction of the highest scores that is left out first, in [0, 1)."""
        ...

    @property
    def epochs(self) -> int:
        """How many scores the caller averages."""
        ...

    @property
    def once(self) -> bool:
        """Whether the choice of a device's first round holds for the run."""
        ...

    def score(self, samples: Samples) -> Tensor:
        """The scores (S,) float32; the highest are kept."""
        ...

    def select(self, scores: Tensor, labels: Tensor, key: int) -> Tensor:
        """The keep mask (S,) bool of samples with `scores` (S,) float32 and `labels` (S,) int64.

        At least one is True when S > 0. Stream `key` decides between equal scores; NaN ranks last.
        """
        ...

    def count(self, labels: Tensor) -> int:
        """How many of the samples with `labels` (S,) `select` keeps, whatever their scores."""
        ...


@dataclass(frozen=True)
class _Fraction:
    keep: float = knob(0.5, "fraction of a device's samples to keep; 1.0 is off", above=0.0, high=1.0)
    once: bool = knob(False, "choose in a device's first round and keep that choice for the whole run")

    def count(self, labels: Tensor) -> int:
        """How many of the samples with `labels` (S,) are kept."""
        return choose.fraction(len(labels), self.keep)


@dataclass(frozen=True)
class _Scored(_Fraction):
    scores_model: ClassVar[bool] = True
    offset: float = knob(0.0, "fraction of the highest scores left out first, against label noise", low=0.0, high=1.0)
    epochs: int = knob(1, "average the scores at the ends of so many last epochs of the local phase", low=1)

    def __post_init__(self) -> None:
        if self.keep + self.offset > 1 + 1e-9:
            raise FedsplitError(
                f"keep={self.keep:g} and offset={self.offset:g} must add up to at most 1, "
                f"got {self.keep + self.offset:g}."
            )

    def select(self, scores: Tensor, labels: Tensor, key: int) -> Tensor:
        """The keep mask (S,) bool: the band [offset, offset + keep) of `scores` (S,), highest first."""
        return choose.band(scores, self.count(labels), self.offset, key)


@dataclass(frozen=True)
class Random(_Fraction):
    """Keeps a random fraction of a device's samples, drawn anew each round: the control of every selector.

    Paper: none; the random baseline of EL2N and GraNd (Paul et al. 2021, arXiv:2107.07075).
    Place: data.select.
    Off: keep=1.0.
    Deviates: keeps at least one sample.
    """

    scores_model: ClassVar[bool] = False
    offset: ClassVar[float] = 0.0
    epochs: ClassVar[int] = 1

    def score(self, samples: Samples) -> Tensor:
        """Zeros (S,): no sample is better than another."""
        return torch.zeros(len(samples.labels))

    def select(self, scores: Tensor, labels: Tensor, key: int) -> Tensor:
        """The keep mask (S,) bool, drawn from stream `key`; `scores` are ignored."""
        return choose.band(torch.zeros(len(labels)), self.count(labels), 0.0, key)


@dataclass(frozen=True)
class El2n(_Scored):
    """Keeps the hardest samples, by the norm of their error: || softmax(logits) - onehot(label) ||_2.

    Paper: EL2N (Paul et al. 2021, arXiv:2107.07075), as in SFPrompt (arXiv:2407.17533).
    Place: data.select.
    Off: keep=1.0.
    Deviates: one model each round, where Paul et al. average about ten early in training; keeps at least one.
    """

    def score(self, samples: Samples) -> Tensor:
        """The error norms (S,), between 0 and sqrt(2)."""
        errors = samples.logits().softmax(dim=1) - F.one_hot(samples.labels, samples.classes)
        norms: Tensor = errors.norm(dim=1)
        return norms


@dataclass(frozen=True)
class BalancedEl2n(El2n):
    """Keeps the hardest samples of each class by EL2N: the same fraction of every class the device holds.

    Paper: the score of EL2N (Paul et al. 2021, arXiv:2107.07075); the balance is ours.
    Place: data.select.
    Off: keep=1.0.
    Deviates: band and offset lie within each class; at least one of each class is kept, so more than `keep` of few.
    """

    def select(self, scores: Tensor, labels: Tensor, key: int) -> Tensor:
        """The keep mask (S,) bool: the band of `scores` (S,) within each class of `labels` (S,)."""
        return choose.band_by_group(scores, labels, self._counts(labels), self.offset, key)

    def count(self, labels: Tensor) -> int:
        """How many of the samples with `labels` (S,) are kept, summed over classes."""
        return sum(self._counts(labels).values())

    def _counts(self, labels: Tensor) -> dict[int, int]:
        return {label: choose.fraction(size, self.keep) for label, size in Counter(labels.tolist()).items()}


@dataclass(frozen=True)
class Entropy(_Scored):
    """Keeps the samples the model is least sure of: the entropy of softmax(logits / temperature).

    Paper: FedFT-EDS (Shi, Radu, Yang 2024, arXiv:2501.00170).
    Place: data.select.
    Off: keep=1.0.
    Deviates: front and tail score, without the body; the temperature is not public, 1.0; keeps at least one.
    """

    temperature: float = knob(1.0, "softmax temperature of the entropy; below 1 is sharper", above=0.0)

    def score(self, samples: Samples) -> Tensor:
        """The entropies (S,) in nats; labels are not used."""
        probabilities = (samples.logits() / self.temperature).softmax(dim=1)
        entropies: Tensor = torch.special.entr(probabilities).sum(dim=1)
        return entropies


@dataclass(frozen=True)
class Loss(_Scored):
    """Keeps the samples of the highest cross-entropy.

    Paper: none; the plain loss, a baseline of EL2N that weighs confident errors without bound.
    Place: data.select.
    Off: keep=1.0.
    Deviates: keeps at least one sample.
    """

    def score(self, samples: Samples) -> Tensor:
        """The cross-entropies (S,) in nats."""
        return F.cross_entropy(samples.logits(), samples.labels, reduction="none")


@dataclass(frozen=True)
class Prototype(_Scored):
    """Keeps the samples nearest to their class's prototype, as many of one class as of another where it can.

    Paper: GDeR (arXiv:2410.13761), for graphs: representative, balanced, unbiased subsets by class prototypes.
    Place: data.select.
    Off: keep=1.0.
    Deviates: prototypes are the device's class means, not trained; the nearest are kept, not drawn at random;
    no term for familiarity; at least one of each class is kept, so more than `keep` of few samples.
    """

    def score(self, samples: Samples) -> Tensor:
        """Minus the distance (S,) of the normalised features to the normalised mean of their class."""
        features = F.normalize(samples.features(), dim=1)
        sums = features.new_zeros(samples.classes, features.shape[1]).index_add_(0, samples.labels, features)
        distances: Tensor = (features - F.normalize(sums, dim=1)[samples.labels]).norm(dim=1)
        return -distances

    def select(self, scores: Tensor, labels: Tensor, key: int) -> Tensor:
        """The keep mask (S,) bool: of each class an even share, rare classes whole.

        `offset` leaves out the most typical samples of a class first, as far as its share allows.
        """
        return choose.band_by_group(scores, labels, self._counts(labels), self.offset, key)

    def count(self, labels: Tensor) -> int:
        """How many of the samples with `labels` (S,) are kept: the fraction, at least one of each class."""
        return sum(self._counts(labels).values())

    def _counts(self, labels: Tensor) -> dict[int, int]:
        sizes = Counter(labels.tolist())
        return choose.even_shares(sizes, max(len(sizes), choose.fraction(len(labels), self.keep)))
