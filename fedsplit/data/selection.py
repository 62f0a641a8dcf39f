"""Selectors: which samples of a device are worth training on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.rng import torch_rng
from fedsplit.types import knob


@dataclass(frozen=True)
class Random:
    """Keeps a random fraction of a device's samples, whatever their scores: the control of every selector.

    Paper: none; the random baseline of EL2N and GraNd (Paul et al. 2021, arXiv:2107.07075).
    Place: data.
    Off: keep=1.0 keeps every sample.
    Deviates: keeps at least one sample.
    """

    keep: float = knob(1.0, "fraction of a device's samples to keep; 1.0 is off", low=0.0, high=1.0)

    def select(self, scores: Tensor, key: int) -> Tensor:
        """The keep mask (S,) bool of samples with `scores` (S,), drawn from stream `key`."""
        total = len(scores)
        mask = torch.zeros(total, dtype=torch.bool)
        mask[torch.randperm(total, generator=torch_rng(key))[: max(1, round(self.keep * total))]] = True
        return mask.to(scores.device)
