"""Retrieval by features: is the nearest image of the gallery of the query's class?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsplit.metrics.privacy import torchmetrics


@dataclass(frozen=True)
class Retrieval:
    """`rank1` is the fraction of queries whose nearest image is of their class, `mean_ap` their mean average precision.

    Both are between 0 and 1. Of features of the model on clean images, high is good: it is the task. Of
    reconstructions, high is bad for whom they show.
    """

    rank1: float
    mean_ap: float
    queries: int
    gallery: int


def retrieve(query: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> Retrieval:
    """Rank `gallery` (G, C) for every row of `query` (Q, C) by cosine similarity; labels are (Q,) and (G,).

    The measures of re-identification (Zheng et al., ICCV 2015), by torchmetrics. Queries without an image of their
    class in the gallery are left out.

    Raises:
        FedsplitError: torchmetrics is not installed.
    """
    functional = torchmetrics().functional.retrieval
    # Above 0: torchmetrics takes what scores less for not found.
    alike = 2 + F.normalize(query, dim=1) @ F.normalize(gallery, dim=1).T
    same = query_labels[:, None] == gallery_labels
    able = same.any(1).nonzero().flatten().tolist()
    first = [functional.retrieval_hit_rate(alike[row], same[row], top_k=1) for row in able]
    precision = [functional.retrieval_average_precision(alike[row], same[row]) for row in able]
    rank1, mean_ap = (float(torch.stack(values).mean()) if values else 0.0 for values in (first, precision))
    return Retrieval(rank1, mean_ap, len(able), len(gallery))
