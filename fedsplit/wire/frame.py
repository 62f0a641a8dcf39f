"""Named tensors as bytes, and back: what really crosses the wire.

A frame is a safetensors document (a length, a JSON header with dtypes and shapes, raw data), so a
receiver never runs code from it. Its length is what the ledger counts.
"""

from __future__ import annotations

import safetensors
import safetensors.torch

from fedsplit.types import FedsplitError, Tensors


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
