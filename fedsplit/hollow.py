"""Running a run's own code on tensors that have shapes and no values."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedsplit.front.cache import FrontCache
from fedsplit.types import Stream, Tensors
from fedsplit.wire.frame import unpack
from fedsplit.wire.link import Codecs, Link
from fedsplit.world import Indices

# The format's names of types, in the order in which it sorts them.
DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip


class Hollow(TorchFunctionMode):
    """Inside, values read out of meta tensors are zeros, and attention keeps what the CPU's fused kernel keeps."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
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


def frame_bytes(codecs: Codecs, stream: Stream, tensors: Tensors) -> int:
    """The length of the frame of `tensors` (of any device) on `stream`, made one tensor at a time."""
    coded: Tensors = {}
    for name, tensor in tensors.items():
        if codecs.get(stream):
            frame = Link(codecs).encode(stream, {name: torch.zeros(tensor.shape, dtype=tensor.dtype)})
            coded |= {key: value.to("meta") for key, value in unpack(frame).items()}
        else:
            coded[name] = tensor
    header, end = {}, 0
    order = list(DTYPES)
    for name in sorted(coded, key=lambda name: (-order.index(coded[name].dtype), name)):
        x = coded[name]
        header[name] = {"dtype": DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + len(text) + -len(text) % 8 + end if header else 0
