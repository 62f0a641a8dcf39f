"""Additive noise on the activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsplit.front.guard import Guard, put
from fedsplit.types import Cut, knob


@dataclass(frozen=True)
class Noise:
    """Adds Gaussian or Laplace noise to everything that is sent, drawn anew for every upload.

    Paper: He, Zhang and Lee, IEEE Internet of Things Journal, 2020: noise on the intermediate activations.
    Place: front.edits.
    Off: scale = 0.
    Deviates: the scale is the noise's standard deviation for both kinds, by default as a multiple of that of
        the activations (of the whole batch, without a gradient), so that rescaling them does not evade it; no
        differential privacy is claimed. A server that sees a sample round after round can average it away.
    """

    kind: str = knob("gaussian", "distribution of the noise", choices=("gaussian", "laplace"))
    scale: float = knob(0.1, "standard deviation of the noise; 0 is off", low=0.0)
    relative: bool = knob(True, "scale is a multiple of the standard deviation of the activations")

    def edit(self, vit: nn.Module, cut: Cut, key: int) -> nn.Module:
        """`vit` with the noise at the end of the front; in evaluation it is drawn from stream `key`.

        Raises:
            FedsplitError: nothing crosses this cut.
        """
        return put(vit, cut, "noise", AddNoise(self, key)) if self.scale else vit


class AddNoise(Guard):
    """Tokens (B, N, C) and noise."""

    draws = True

    def __init__(self, settings: Noise, stream: int) -> None:
        super().__init__(stream)
        self.settings = settings

    def act(self, x: Tensor) -> Tensor:
        """`x` (B, N, C) with noise."""
        source = self.source
        if self.settings.kind == "gaussian":
            unit = torch.randn(x.shape, generator=source)
        else:  # the difference of two exponentials is a Laplace variable of variance 2
            one, other = (torch.empty(x.shape).exponential_(generator=source) for _ in range(2))
            unit = (one - other) / 2**0.5
        spread = x.detach().std(correction=0) if self.settings.relative else 1.0
        return x + self.settings.scale * spread * unit.to(x.device, x.dtype)
