"""Named tensors as bytes, and back: what really crosses the wire.

A frame is a safetensors document (a length, a JSON header with dtypes and shapes, raw data), so a
receiver never runs code from it. Its length is what the ledger counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import safetensors
import safetensors.torch
import torch

from fedsplit.types import FedsplitError, Tensors

# The format's names of types, in the order in which it sorts them.
DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
_ORDER = {dtype: place for place, dtype in enumerate(DTYPES)}


def pack(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    """The frame of `tensors`; no tensors give no bytes. A file may say `metadata` of them."""
    if not tensors:
        return b""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    frame: bytes = safetensors.torch.save(plain, metadata)
    return frame


def unpack(frame: bytes) -> Tensors:
    """The tensors of a frame, in CPU memory of their own.

    Raises:
        FedsplitError: the bytes are not a frame.
    """
    if not frame:
        return {}
    try:
        tensors: Tensors = safetensors.torch.load(frame)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise FedsplitError(f"Received bytes that are not a frame: {error}.") from None
    return tensors


def frame_length(tensors: Mapping[str, torch.Tensor]) -> int:
    """The bytes that `pack` would make of `tensors` (of any device), without making them."""
    header, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-_ORDER[tensors[name].dtype], name)):
        x = tensors[name]
        header[name] = {"dtype": DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + len(text) + -len(text) % 8 + end if header else 0
