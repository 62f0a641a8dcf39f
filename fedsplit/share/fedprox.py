"""A proximal term in the local loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsplit.types import knob


@dataclass(frozen=True)
class FedProx:
    """Adds (mu / 2) ||w - w_t||^2 to the local loss, where w_t are the round's global weights.

    Paper: arXiv 1812.06127, eq. 2.
    Place: share.proximal.
    Off: mu = 0.
    Deviates: added as its gradient mu (w - w_t), on either side of the split, so the term needs no
        exchange and is not part of the reported loss.
    """

    mu: float = knob(0.01, "weight of the proximal term", low=0.0)

    def gradient(self, parameter: Tensor, anchor: Tensor) -> Tensor:
        """The gradient of the term at `parameter`."""
        return self.mu * (parameter - anchor)
