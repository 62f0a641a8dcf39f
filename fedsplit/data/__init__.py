"""The data place: what the devices hold, and which of it they train on.

`sources` reads an image set, `partitions` deals it to devices, `selection` prunes a device's
samples, `batches` turns what is left into tensors. The rest serves these: `parquet`, `hub`, `raw` and
`decode` the sources, `partitioners` and `picture` the partitions, `store` (the cache folder) both.

A selector is a frozen dataclass with `score(samples) -> scores`, the highest worth keeping,
`select(scores, labels, key) -> keep mask` with at least one True, and `count(labels)`, how many that
keeps (`selection.Selector` is the protocol). The masks of several selectors combine by 'and'.
"""

from __future__ import annotations

from fedsplit.data.selection import BalancedEl2n, El2n, Entropy, Loss, Prototype, Random, Selector

SELECTORS: dict[str, type[Selector]] = {
    "random": Random,
    "el2n": El2n,
    "el2n-balanced": BalancedEl2n,
    "entropy": Entropy,
    "loss": Loss,
    "prototype": Prototype,
}
