"""What an attacker has: what the server saw, the knowledge that the threat model declares, and its budget.

Images are (S, 3, height, width) float32 between 0 and 1, on both sides of an attack. Attack code imports
torch, `fedsplit.types`, `fedsplit.rng` and this folder alone: the originals are nowhere within its reach.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from fedsplit.attacks.work import Work
from fedsplit.types import FedsplitError

Query = Callable[[Tensor, int], Tensor]
KNOWABLE = ("front", "body", "tail", "query", "auxiliary", "labels", "hijack")


@dataclass(frozen=True)
class Transcript:
    """What the server saw of S samples, after compression, decoded as it decodes.

    `activations` (R, S, N, C) float32 are R uploads of each sample at the cut, in the order of the samples,
    `gradients` (R, S, M, C) those that came up for what the body sent down, where they do: a sample's own share
    of the gradient of a mean loss over `batch` samples. `labels` (S,) int64 are there in a vanilla split alone.
    `shape` is that of an image, (3, height, width), and `tokens` says how many of the N tokens precede the patches.
    """

    activations: Tensor
    shape: tuple[int, int, int]
    tokens: int = 0
    gradients: Tensor | None = None
    labels: Tensor | None = None
    batch: int = 1

    @property
    def last(self) -> Tensor:
        """The last upload of every sample, (S, N, C)."""
        return self.activations[-1]

    @property
    def mean(self) -> Tensor:
        """The mean of a sample's uploads, (S, N, C): what is left of noise that is drawn anew for each."""
        return self.activations.mean(0)


class Hijack(Protocol):
    """The clients' training under a malicious server: it sees what they send and answers what it likes."""

    def upload(self) -> Tensor:
        """Activations (B, N, C) of the clients' next batch."""

    def answer(self, gradient: Tensor) -> None:
        """A gradient (B, N, C) for that batch; the clients' optimiser takes its step by it."""

    def victims(self) -> Tensor:
        """Activations (S, N, C) of the samples under attack, as the clients' front is now."""


@dataclass(frozen=True)
class Knowledge:
    """What an attacker knows besides the transcript; None is what it does not.

    `front` maps images (B, 3, height, width) in [0, 1] to what would cross the cut, (B, N, C), before
    compression and without anything random: weights, prompts and defence are known, gradients flow.
    `body` maps activations (B, N, C) to what the server sends down, (B, M, C), and `tail` that to logits
    (B, classes). `query(images, key)` is what the server would see of images, noise and compression with it; a key
    is a draw. `auxiliary` (A, 3, height, width) are images of the attacker's own, `labels` (A,) int64 theirs.
    `hijack` is the clients' training, to be led astray.
    """

    front: Callable[[Tensor], Tensor] | None = None
    body: Callable[[Tensor], Tensor] | None = None
    tail: Callable[[Tensor], Tensor] | None = None
    query: Query | None = None
    auxiliary: Tensor | None = None
    labels: Tensor | None = None
    hijack: Hijack | None = None

    @property
    def rest(self) -> Callable[[Tensor], Tensor] | None:
        """Activations (B, N, C) to logits (B, classes): body and tail; None where either is unknown."""
        body, tail = self.body, self.tail
        return None if body is None or tail is None else lambda activations: tail(body(activations))

    def lacks(self, needs: Sequence[str]) -> list[str]:
        """Those of `needs` that it does not have."""
        return [name for name in needs if getattr(self, name) is None]


class Attack(Protocol):
    """A piece of `audit.attacks`. `needs` names fields of `Knowledge`, `finds` is "images" or "labels"."""

    needs: ClassVar[tuple[str, ...]]
    finds: ClassVar[str]

    def run(self, transcript: Transcript, knowledge: Knowledge, key: int, work: Work) -> Tensor:
        """Reconstructed images (S, 3, height, width) in [0, 1], or inferred labels (S,) int64.

        The same `key` gives the same result, whether or not `work` was interrupted.
        """


class NotApplicable(FedsplitError):
    """This attack has no hold on this transcript; the message says why."""


def check(attack: Attack, name: str, knowledge: Knowledge) -> None:
    """Whether `knowledge` has what `attack` needs.

    Raises:
        NotApplicable: it does not.
    """
    if lacking := knowledge.lacks(attack.needs):
        raise NotApplicable(f"{name} needs {' and '.join(lacking)}, which this threat model does not grant.")
