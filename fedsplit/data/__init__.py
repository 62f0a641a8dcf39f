"""The data place: what the devices hold, and which of it they train on.

`sources` reads an image set, `partitions` deals it to devices, `selection` prunes a device's
samples, `batches` turns what is left into tensors. The rest serves these: `parquet`, `hub`, `raw` and
`decode` the sources, `partitioners` and `picture` the partitions, `store` (the cache folder) both.

A selector is a frozen dataclass with `select(scores, key) -> keep mask`: `scores` (S,) float, one
figure a sample, the mask (S,) bool with at least one True. Several selectors combine by 'and'.
"""

from __future__ import annotations

from typing import Any

from fedsplit.data.selection import Random

SELECTORS: dict[str, type[Any]] = {
    "random": Random,
}
