"""Weighted and uniform averaging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.types import Tensors


@dataclass(frozen=True)
class FedAvg:
    """The average of the updates, weighted by their numbers of samples.

    Paper: arXiv 1602.05629, algorithm 1.
    Place: share.merge.
    Off: one client; its parameters come back bit for bit.
    Deviates: sums in float64 in the order given (client id), so that the result is reproducible.
    """

    def merge(self, base: Mapping[str, Tensor], updates: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
        """The new model; a tensor that nobody shares keeps its value in `base`."""
        return {name: _average(value, name, updates, weights) for name, value in base.items()}


@dataclass(frozen=True)
class Uniform:
    """The plain mean of the updates, whatever their numbers of samples.

    Paper: arXiv 2412.19989 (Caesar), algorithm line 14, and the official SplitFed code.
    Place: share.merge.
    Off: one client.
    Deviates: sums in float64 in the order given.
    """

    def merge(self, base: Mapping[str, Tensor], updates: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
        """The new model; a tensor that nobody shares keeps its value in `base`."""
        return FedAvg().merge(base, updates, [1.0] * len(updates))


def _average(base: Tensor, name: str, updates: Sequence[Tensors], weights: Sequence[float]) -> Tensor:
    shared = [(update[name], weight) for update, weight in zip(updates, weights, strict=True) if name in update]
    if not shared:
        return base
    total = sum(weight for _, weight in shared)
    mean = torch.zeros(base.shape, dtype=torch.float64)
    for value, weight in shared:
        mean.add_(value.to("cpu", torch.float64), alpha=weight / total)
    return mean.to(base.dtype)
