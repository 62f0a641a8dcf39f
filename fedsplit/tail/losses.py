"""Losses of the tail."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of `logits` (B, classes) against `labels` (B,)."""
    return F.cross_entropy(logits, labels)
