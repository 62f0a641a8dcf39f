"""Pure choosers that every method shares: which entries to keep, by their scores.

The highest score is the first choice. A tie is decided by a seeded stream, never by position: equal
scores do not favour the entries that happen to stand first. NaN ranks below every other score.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsplit import rng


def fraction(total: int, keep: float) -> int:
    """How many of `total` entries a fraction `keep` is: rounded, at least one where there is one."""
    return min(total, max(1, round(keep * total)))


def ranked(scores: Tensor, key: int) -> Tensor:
    """The positions (S,) int64 of `scores` (S,), best first; stream `key` orders equal scores."""
    shuffled = torch.randperm(len(scores), generator=rng.torch_rng(key))
    known = scores.masked_fill(scores.isnan(), -torch.inf)
    return shuffled[known[shuffled].argsort(descending=True, stable=True)]


def band(scores: Tensor, count: int, offset: float, key: int) -> Tensor:
    """The mask (S,) bool of the `count` best of `scores` (S,) after the best fraction `offset` is left out.

    The band moves up where it would not fit: `count` entries are kept whatever `offset` is.
    """
    total = len(scores)
    start = min(round(offset * total), total - count)
    mask = torch.zeros(total, dtype=torch.bool)
    mask[ranked(scores, key)[start : start + count]] = True
    return mask


def band_by_group(scores: Tensor, groups: Tensor, counts: Mapping[int, int], offset: float, key: int) -> Tensor:
    """Like `band` within each group of `groups` (S,) int64, with `counts` entries each: a mask (S,) bool."""
    mask = torch.zeros(len(scores), dtype=torch.bool)
    for group, count in counts.items():
        members = groups == group
        mask[members] = band(scores[members], count, offset, rng.key(key, group))
    return mask


def even_shares(sizes: Mapping[int, int], total: int) -> dict[int, int]:
    """`total` dealt to groups as evenly as their `sizes` allow: small groups whole, the rest alike.

    The shares add up to `total` where it is no more than all sizes together; where they do not
    divide, the larger groups have one more.
    """
    shares: dict[int, int] = {}
    for done, group in enumerate(sorted(sizes, key=lambda group: (sizes[group], group))):
        left = total - sum(shares.values())
        shares[group] = min(sizes[group], left // (len(sizes) - done))
    return shares
