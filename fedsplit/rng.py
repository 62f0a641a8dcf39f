"""Named random streams. A draw depends on its name, never on what was drawn before it.

`key(seed, "batch", round, client)` is the same number in every process and runtime, so clients may
run in any order, on any machine, or twice, and meet the same randomness.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def key(seed: int, *name: int | str) -> int:
    """A 63-bit integer for a named stream, e.g. `key(0, "batch", round, client, step)`."""
    text = "/".join(str(part) for part in (seed, *name)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def torch_rng(stream: int) -> torch.Generator:
    """A CPU generator for `stream`; draws are made on the CPU so that every device agrees."""
    return torch.Generator().manual_seed(stream)


def numpy_rng(stream: int) -> np.random.Generator:
    """A NumPy generator for `stream`."""
    return np.random.default_rng(stream)
