"""Statistical dependence of activations on images, as a term of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsplit.front.vit import Part
from fedsplit.types import knob

_EPS = 1e-12


@dataclass(frozen=True)
class NoPeek:
    """Adds weight times the distance correlation between the images of a batch and their activations.

    Paper: arXiv 2008.09161 (NoPeek).
    Place: front.penalties.
    Off: weight = 0.
    Deviates: samples that are equal up to rounding have distance 0 and no gradient, since a square root has none
        there. The sample's distance correlation is biased upwards in small batches of many dimensions: compare
        values at one batch size only. The account of FLOPs leaves the term out.
    """

    weight: float = knob(0.1, "weight of the distance correlation; 0 is off", low=0.0)

    def penalty(self, front: Part, x: Tensor, h: Tensor, memory: Any, key: int) -> tuple[Tensor, Any]:
        """The term for images `x` (B, 3, height, width) and activations `h` (B, N, C); it has no memory."""
        if not self.weight or not h.requires_grad:
            return h.new_zeros(()), memory
        return self.weight * distance_correlation(x, h), memory


def distance_correlation(x: Tensor, z: Tensor) -> Tensor:
    """The distance correlation of samples `x` (B, ...) and `z` (B, ...), between 0 and 1; 0 where one is constant.

    With A and B the doubly centred matrices of pairwise distances, sqrt(mean(A B)) / (mean(A A) mean(B B))^(1/4)
    over their entries (Székely, Rizzo and Bakirov, Annals of Statistics, 2007, definition 4).
    """
    a, b = _centred(x), _centred(z)
    joint = (a * b).mean().clamp(min=_EPS**2)
    spread = (a * a).mean().clamp(min=_EPS) * (b * b).mean().clamp(min=_EPS)
    return joint.sqrt() / spread.pow(0.25)


def _centred(x: Tensor) -> Tensor:
    """Pairwise distances (B, B) of `x` (B, ...), with the means of rows and columns taken out."""
    flat = x.flatten(1)
    flat = flat - flat.mean(0)  # distances stay, and less is lost where nearly equal squares are subtracted
    square = flat.square().sum(1)
    squares = square[:, None] + square[None] - 2 * flat @ flat.T
    # What is left of nearly equal squares is rounding: such samples count as the same.
    same = (squares <= 1e-6 * square.mean() + _EPS) | torch.eye(len(x), dtype=torch.bool, device=x.device)
    distances = squares.masked_fill(same, 1.0).sqrt().masked_fill(same, 0.0)
    return distances - distances.mean(0) - distances.mean(1, keepdim=True) + distances.mean()
