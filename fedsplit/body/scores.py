"""What each unit of a block contributes, from its weights and their gradients: the scores of D2FT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsplit.body.ops import dealt, runs_of, units

METRICS = ("magnitude", "gradient", "fisher", "taylor")


def contributions(block: nn.Module, whole: bool = False) -> dict[str, Tensor]:
    """Scores of every unit (U,) float32 on the CPU, by metric, over the entries that belong to it.

    "magnitude" is the sum of |w|, of frozen weights too. The others are of the gradients g that the block
    holds, zero where there is none: "gradient" the sum of |g|, "fisher" of g^2, "taylor" of |g w|. Of a
    mini-batch's mean gradient, "fisher" is the usual estimate of the diagonal empirical Fisher information,
    not its mean over samples. A block of one unit, or taken as a `whole`, is scored over all its parameters.

    The scores are those that D2FT (arXiv 2504.12471) names, and first-order Taylor (arXiv 1906.10771).
    """
    count = 1 if whole else units(block)
    parts = dealt(block) if count > 1 else {name: (p, 0, 1) for name, p in block.named_parameters()}
    scores = {metric: torch.zeros(count, dtype=torch.float64) for metric in METRICS}
    for name, (parameter, dim, groups) in parts.items():
        if name.startswith("prompt_"):  # a prompt before or after the block is no part of it
            continue
        owner = _owner(count, parameter.shape[dim], groups)
        for metric, value in _values(parameter).items():
            scores[metric].index_add_(0, owner, value.movedim(dim, 0).reshape(len(owner), -1).sum(1).cpu())
    return {metric: score.float() for metric, score in scores.items()}


def _values(parameter: nn.Parameter) -> dict[str, Tensor]:
    w = parameter.detach().double()
    values = {"magnitude": w.abs()}
    if parameter.grad is not None and parameter.requires_grad:
        g = parameter.grad.double()
        values |= {"gradient": g.abs(), "fisher": g.square(), "taylor": (g * w).abs()}
    return values


def _owner(count: int, size: int, groups: int) -> Tensor:
    """The unit (size,) int64 that every entry of a dimension belongs to."""
    owner = torch.empty(size, dtype=torch.int64)
    for unit in range(count):
        for start, length in runs_of((unit,), count, size, groups):
            owner[start : start + length] = unit
    return owner
