"""Running a run's own code on tensors that have shapes and no values."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedsplit.front.cache import FrontCache
from fedsplit.types import Stream, Tensors
from fedsplit.wire.codec import Codecs
from fedsplit.wire.frame import frame_length, unpack
from fedsplit.wire.link import Link
from fedsplit.world import Indices

# What changes values alone: most of an optimiser's step, and torch works out the shapes of each in Python.
IN_PLACE = frozenset({Tensor.add_, Tensor.addcdiv_, Tensor.addcmul_, Tensor.lerp_, Tensor.mul_})


class Hollow(TorchFunctionMode):
    """Inside, values read out of meta tensors are zeros, and attention keeps what the CPU's fused kernel keeps.

    Where no graph is recorded, changes in place are left out.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if function in IN_PLACE and not torch.is_grad_enabled():
                return args[0]
            if function is Tensor.item:
                return 0.0
            if function is Tensor.cpu:
                return torch.zeros(args[0].shape, dtype=args[0].dtype)
            if function is F.scaled_dot_product_attention and len(args) == 3 and not any(kwargs.values()):
                return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, 0.0, False)[0]
        return function(*args, **kwargs)


class HollowCache(FrontCache):
    """Counts what would be kept, as on a machine where outputs do not depend on the batch, and keeps nothing."""

    def tokens(self, indices: Indices) -> Tensor:
        """Tokens (B, N, C) without values."""
        return self._run(self._pixels(indices))

    @cached_property
    def _tried(self) -> tuple[bool, tuple[int, ...]]:
        return True, tuple(self.tokens(np.arange(1)).shape[1:])


def frame_bytes(codecs: Codecs, stream: Stream, tensors: Tensors, again: bool = False) -> int:
    """The length of the frame of `tensors` (of any device) on `stream`, made one tensor at a time.

    It is that of a client's first round, or of a later one where codecs remember: `again`.
    """
    coded: Tensors = {}
    for name, tensor in tensors.items():
        if codecs.get(stream):
            link, one = Link(codecs), {name: torch.zeros(tensor.shape, dtype=tensor.dtype)}
            for _ in range(1 + again):
                if stream == "parameters-up":
                    link.hold(stream, one)
                frame = link.encode(stream, one)
            coded |= {key: value.to("meta") for key, value in unpack(frame).items()}
        else:
            coded[name] = tensor
    return frame_length(coded)
