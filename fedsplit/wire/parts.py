"""What codecs are made of: packed bits, shapes and positions as side tensors, and their checks.

A decoder reads what anybody may have sent, so each reader here says what it wants and refuses the rest
before it makes anything of that size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedsplit.types import FedsplitError, Tensors

MOST_AXES = 8


def pack_bits(bits: Tensor) -> Tensor:
    """Bits (d,) bool as bytes (d / 8, rounded up) uint8, the first bit highest; the last byte is filled with 0."""
    return torch.from_numpy(np.packbits(bits.reshape(-1).numpy()))


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The `count` bits (d,) bool that `pack_bits` packed.

    Raises:
        FedsplitError: another number of bytes, or a last byte that is not filled with 0.
    """
    if packed.shape != (-(-count // 8),) or packed.dtype is not torch.uint8:
        raise FedsplitError(f"{tuple(packed.shape)} bytes are not {count} bits")
    bits = np.unpackbits(packed.numpy())
    if bits[count:].any():
        raise FedsplitError("the bits go on after their end")
    return torch.from_numpy(bits[:count].astype(bool))


def pack_levels(levels: Tensor, bits: int) -> Tensor:
    """Whole numbers (d,) uint8 below 2 ** bits as bytes (d * bits / 8, rounded up) uint8, the first number highest."""
    if 8 % bits:
        return pack_bits(torch.from_numpy(np.unpackbits(levels.numpy()[:, None], axis=1)[:, 8 - bits :].astype(bool)))
    filled = torch.nn.functional.pad(levels, (0, -len(levels) % (8 // bits))).reshape(-1, 8 // bits)
    packed = torch.zeros(len(filled), dtype=torch.uint8)
    for column in filled.unbind(1):  # several numbers fill a byte: shifts do, at a third of the time
        packed = column if bits == 8 else (packed << bits) | column
    return packed


def unpack_levels(packed: Tensor, count: int, bits: int) -> Tensor:
    """The `count` whole numbers (d,) uint8 that `pack_levels` packed.

    Raises:
        FedsplitError: another number of bytes, or a last byte that is not filled with 0.
    """
    if 8 % bits:
        flags = unpack_bits(packed, count * bits).numpy().reshape(count, bits)
        return torch.from_numpy(np.packbits(flags, axis=1)[:, 0] >> (8 - bits) if count else np.zeros(0, np.uint8))
    if packed.shape != (-(-count * bits // 8),) or packed.dtype is not torch.uint8:
        raise FedsplitError(f"{tuple(packed.shape)} bytes are not {count * bits} bits")
    columns = [(packed >> shift) & (2**bits - 1) for shift in range(8 - bits, -1, -bits)]
    levels = torch.stack(columns, 1).reshape(-1)
    if levels[count:].any():
        raise FedsplitError("the bits go on after their end")
    return levels[:count]


def count_of(size: int, keep: float) -> int:
    """How many of `size` values a share `keep` is: rounded, at least one where there is one."""
    return min(size, max(1, round(keep * size)))


def largest(x: Tensor, count: int) -> Tensor:
    """Where the `count` largest absolute values of each row of `x` (R, D) are, (R, D) bool; of equals the first."""
    magnitude = x.abs() if x.dtype in (torch.float32, torch.float64) else x.abs().float()
    place = x.shape[-1] - count
    # numpy, since its partition takes a seventh of the time of torch.topk (two thirds of 147,456 values).
    least = torch.from_numpy(np.partition(magnitude.numpy(), place, axis=-1)[:, place : place + 1])
    found = magnitude >= least
    if int(found.sum()) == count * len(x):
        return found
    above, equal = magnitude > least, magnitude == least
    return above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def finite(x: Tensor) -> bool:
    """Whether all values are finite: a sum is at once, and only where it is not does each have to be looked at."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def take(side: Tensors, name: str, dtype: torch.dtype, shape: Sequence[int] | None = None) -> Tensor:
    """The side tensor `name`, out of `side`.

    Raises:
        FedsplitError: it is missing, or of another type or shape.
    """
    if name not in side:
        raise FedsplitError(f"its part '{name}' is missing")
    x = side.pop(name)
    if x.dtype is not dtype or (shape is not None and tuple(x.shape) != tuple(shape)):
        raise FedsplitError(f"its part '{name}' is {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}")
    return x


def shape_part(x: Tensor) -> Tensors:
    """The side tensor that tells the shape of `x`."""
    return {"shape": torch.tensor(x.shape, dtype=torch.int64)}


def take_shape(side: Tensors, most: int) -> tuple[int, ...]:
    """The shape that `shape_part` wrote.

    Raises:
        FedsplitError: it is none, or has more than `most` values.
    """
    told = take(side, "shape", torch.int64)
    shape = tuple(told.tolist()) if told.ndim == 1 and len(told) <= MOST_AXES else (-1,)
    if min(shape, default=0) < 0:
        raise FedsplitError("its part 'shape' is no shape")
    if math.prod(shape) > most:
        raise FedsplitError(f"it would have {math.prod(shape)} values, more than {most}")
    return shape


def where_part(mask: Tensor) -> Tensors:
    """Where a mask (d,) bool is true: packed bits, or the positions where those take fewer bytes.

    Which of both depends on the two counts alone.
    """
    size, count = mask.numel(), int(mask.sum())
    dtype = _index(size)
    if count * dtype.itemsize >= -(-size // 8):
        return {"mask": pack_bits(mask)}
    places = mask.nonzero().reshape(-1)
    return {"index": places.to(torch.int32) if dtype is torch.int32 else (places - 2**15).to(torch.int16)}


def take_where(side: Tensors, size: int, count: int) -> Tensor:
    """The mask (size,) bool of `count` places that `where_part` wrote.

    Raises:
        FedsplitError: it is none.
    """
    dtype = _index(size)
    if count > size:
        raise FedsplitError(f"{count} values have no room among {size}")
    if count * dtype.itemsize >= -(-size // 8):
        mask = unpack_bits(take(side, "mask", torch.uint8), size)
    else:
        places = take(side, "index", dtype, (count,)).to(torch.int64)
        places = places + 2**15 if dtype is torch.int16 else places
        if count and (int(places.min()) < 0 or int(places.max()) >= size):
            raise FedsplitError("its part 'index' points outside")
        mask = torch.zeros(size, dtype=torch.bool)
        mask[places] = True
    if int(mask.sum()) != count:
        raise FedsplitError(f"it names {int(mask.sum())} places for {count} values")
    return mask


def rows(x: Tensor) -> Tensor:
    """`x` as rows (R, D) of its last axis; a scalar is one row of one."""
    return x.reshape(-1, x.shape[-1]) if x.ndim and x.numel() else x.reshape(1, -1)


def _index(size: int) -> torch.dtype:
    return torch.int16 if size <= 2**16 else torch.int32
