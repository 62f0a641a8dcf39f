"""How far recovered weights are from those that were sent."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedsplit.types import Tensors
from fedsplit.wire.link import Link
from fedsplit.wire.recover import STALE, Recover


def deviation(link: Link, memory: Mapping[str, Tensor], sent: Tensors, frame: bytes) -> dict[str, float]:
    """How far the weights that a client recovers from `frame` are from those `sent`, and how far its stale ones are.

    Both as relative L2 errors over the tensors of which the client has a stale copy, as fields of `Report`; nothing
    where it has none. It takes the client's `memory` beside the weights at the server, so only a simulation can
    tell. `link` is a new one, for this alone.
    """
    if not any(isinstance(stage, Recover) for stage in link.codecs.get("parameters-down", ())):
        return {}
    link.recall(memory)
    down = {name: held for (stream, name, _), held in link.memory.items() if stream == "parameters-down"}
    stale = {name: held[STALE] for name, held in down.items() if STALE in held}
    decoded = link.decode("parameters-down", frame)
    squares = [0.0, 0.0, 0.0]
    for name in sorted(stale.keys() & decoded.keys()):
        w = sent[name].double()
        for place, other in enumerate((torch.zeros_like(w), decoded[name].double(), stale[name].double())):
            squares[place] += float((other - w).square().sum())
    whole, recovered, old = (math.sqrt(square) for square in squares)
    return {"recover_error": recovered / whole, "stale_error": old / whole} if whole else {}
