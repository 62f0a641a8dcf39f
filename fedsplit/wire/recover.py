"""Caesar's download codec: the largest weights exactly, of the others the sign, recovered from a stale copy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsplit.types import FedsplitError, Tensors, knob
from fedsplit.wire import parts
from fedsplit.wire.codec import PARAMETERS, WHOLE
from fedsplit.wire.link import Context
from fedsplit.wire.parts import count_of, take

SMALL = ("cls_token", "dist_token", "reg_token", "pos_embed")
STALE = "stale"


@dataclass(frozen=True)
class Recover:
    """The share `keep` of largest magnitude exactly; of the rest sign bits, and mean a and maximum m of |w|.

    The receiver recovers the rest from its stale value v of the same tensor. Rule `paper`: v where its sign is the
    one received and |v| <= m, else sign * a. Rule `clamp`: sign * min(|v|, m) where the sign is right. Rule `none`,
    or where there is no stale value: sign * a.

    Paper: arXiv 2412.19989 (Caesar), download codec and recovery; keep is 1 - theta.
    Place: wire, any stream. On parameters who never received the tensor gets it exactly, and so does everybody biases,
        norms, class and position tokens. On activations and their gradients there is no stale value.
    Off: keep = 1.
    Deviates: positions are packed bits, or a list where that is shorter; the sign of 0 is plus.
    """

    keep: float = knob(0.4, "share that is sent exactly, 1 - theta of the paper; 1.0 is all", above=0.0, high=1.0)
    rule: str = knob("paper", "recovery of the rest: 'paper', 'clamp' or 'none'", choices=("paper", "clamp", "none"))
    stale: str = knob(
        "trained", "the stale value: the client's own after its last training, or as last 'received'",
        choices=("trained", "received"),
    )  # fmt: skip

    def encode(self, x: Tensor, memory: Any, context: Context) -> tuple[Tensor, Tensors, Any]:
        """The kept values (k,), with side tensors `mask` or `index`, `sign`, `part` (a, m) and `shape`."""
        after = {"met": torch.empty(0)} if context.stream == "parameters-down" and not _small(x, context) else None
        if not x.is_floating_point():
            return x, {}, after
        first = context.stream in PARAMETERS and memory is None
        if self.keep == 1 or first or _small(x, context) or not x.numel():
            return x, {WHOLE: torch.empty(0, dtype=torch.uint8)}, after
        mask = parts.largest(x.reshape(1, -1), count_of(x.numel(), self.keep)).reshape(-1)
        rest = x.reshape(-1).masked_select(~mask).float()
        size = rest.abs().double()
        part = torch.stack([size.mean(), size.amax()]).float() if len(rest) else torch.zeros(2)
        side = parts.where_part(mask) | {"sign": parts.pack_bits(rest >= 0), "part": part} | parts.shape_part(x)
        return x.reshape(-1).masked_select(mask), side, after

    def decode(self, x: Tensor, side: Tensors, memory: Any, context: Context) -> tuple[Tensor, Any]:
        """The recovered tensor; `memory` holds the stale value, where there is one."""
        whole = side.pop(WHOLE, None) is not None or (not side and not x.is_floating_point())
        out = x if whole else self._recovered(x, side, (memory or {}).get(STALE), context)
        keeps = context.stream == "parameters-down" and self.stale == "received" and not _small(out, context)
        return out, ({STALE: out} if keeps else memory if context.stream == "parameters-down" else None)

    def hold(self, x: Tensor, memory: Any, context: Context) -> Any:
        """The stale value of the next round: what the client trained; of an upload, what the server has."""
        if _small(x, context) or (context.stream == "parameters-down" and self.stale == "received"):
            return memory
        return {STALE: x}

    def _recovered(self, x: Tensor, side: Tensors, stale: Tensor | None, context: Context) -> Tensor:
        shape = parts.take_shape(side, context.most)
        size = math.prod(shape)
        if x.ndim != 1 or len(x) > size or not x.is_floating_point() or len(x) != count_of(size, self.keep):
            raise FedsplitError(f"it has values {tuple(x.shape)} where {count_of(size, self.keep)} belong")
        mask = parts.take_where(side, size, len(x))
        signs = parts.unpack_bits(take(side, "sign", torch.uint8), size - len(x))
        mean, most = take(side, "part", torch.float32, (2,))
        guess = torch.where(signs, mean, -mean)
        if stale is not None and self.rule != "none":
            if stale.shape != shape:
                raise FedsplitError(f"the stale copy is {tuple(stale.shape)}")
            held = stale.reshape(-1).masked_select(~mask)
            agree = (held >= 0) == signs
            if self.rule == "paper":
                guess = held.where(agree & (held.abs() <= most), guess)
            else:
                guess = held.clamp(-most, most).where(agree, guess)
        out = torch.empty(size).masked_scatter_(mask, x.float()).masked_scatter_(~mask, guess)
        return out.reshape(shape)


def _small(x: Tensor, context: Context) -> bool:
    """Whether a parameter is so small that it is always sent exactly: biases, norms, class and position tokens."""
    if context.stream not in PARAMETERS:
        return False
    return x.squeeze().ndim < 2 or context.tensor.rpartition(".")[2] in SMALL
