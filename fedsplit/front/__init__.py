"""The client's first part: patch embedding, prompts, first blocks, and what guards their output.

An *edit* changes the backbone at build: `edit(vit, cut, key) -> vit`, applied before the cut, so that a
global block number means the same on both sides. A *penalty* adds a term to the loss of the front:
`penalty(front, x, h, memory, key) -> (scalar, memory)`.
"""

from __future__ import annotations

from typing import Any

from fedsplit.front.adversary import Adversary
from fedsplit.front.bottleneck import Bottleneck
from fedsplit.front.feature_dropout import FeatureDropout
from fedsplit.front.linear_adversary import LinearAdversary
from fedsplit.front.lipschitz import Lipschitz
from fedsplit.front.merge import Merge
from fedsplit.front.noise import Noise
from fedsplit.front.nopeek import NoPeek
from fedsplit.front.prompts import Prompts
from fedsplit.front.quantize import Quantize
from fedsplit.front.shuffle import Shuffle

EDITS: dict[str, type[Any]] = {
    "prompts": Prompts,
    "noise": Noise,
    "feature-dropout": FeatureDropout,
    "shuffle": Shuffle,
    "quantize": Quantize,
    "bottleneck": Bottleneck,
    "merge": Merge,
}
PENALTIES: dict[str, type[Any]] = {
    "nopeek": NoPeek,
    "lipschitz": Lipschitz,
    "adversary": Adversary,
    "linear-adversary": LinearAdversary,
}
