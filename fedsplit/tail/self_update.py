"""Training without the server."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsplit.tail.losses import cross_entropy
from fedsplit.types import knob


@dataclass(frozen=True)
class SelfUpdate:
    """Trains front and tail on all local samples by the local loss: front joined to tail, body left out.

    Paper: arXiv 2407.17533 (SFPrompt), phase 1.
    Place: local.phases.
    Off: epochs = 0.
    Deviates: the optimiser starts anew between this phase and the split steps, since the tail meets
        tokens of another depth; where the class token has not met the image yet, the tail reads the
        mean of the patches (`local.head`).
    """

    epochs: int = knob(10, "passes over all local samples before the split steps", low=0)
    rate: float = knob(1.0, "learning rate of this phase, as a multiple of the round's", low=0.0)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of `logits` (B, K) against `labels` (B,)."""
        return cross_entropy(logits, labels)
