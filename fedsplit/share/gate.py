"""What an update must be before it may touch the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedsplit.types import FedsplitError, Tensors, Update
from fedsplit.wire.frame import unpack
from fedsplit.wire.link import Link


class Refused(Exception):
    """An update that is not let in; the message says why."""


def admit(
    update: Update, link: Link, client: Mapping[str, torch.Tensor], server: Mapping[str, torch.Tensor], limit: int
) -> tuple[Tensors, Tensors]:
    """The client's and the server-side tensors of `update`, checked against those the round began with.

    Raises:
        Refused: too many bytes, an impossible sample count, bytes that are no frame, wrong names,
            shapes or types, or values that are not finite.
    """
    if type(update.samples) is not int or update.samples <= 0:
        raise Refused(f"it counts {update.samples} samples")
    if len(update.up) > limit:
        raise Refused(f"its update of {len(update.up)} bytes is over the limit of {limit}")
    try:
        tensors = link.decode("parameters-up", update.up)
        state = unpack(update.server)
    except Exception as error:  # whatever a codec says to bytes it did not expect
        raise Refused(str(error) if isinstance(error, FedsplitError) else f"{type(error).__name__}: {error}") from None
    _check(tensors, client)
    _check({name: x for name, x in state.items() if "|" not in name}, server)
    for name, moment in state.items():
        if not torch.isfinite(moment).all():
            raise Refused(f"'{name}' holds values that are not finite")
    return tensors, state


def _check(tensors: Tensors, expected: Mapping[str, torch.Tensor]) -> None:
    unknown, missing = sorted(set(tensors) - set(expected)), sorted(set(expected) - set(tensors))
    if unknown:
        raise Refused(f"it names a parameter '{unknown[0]}' that was not asked for")
    if missing:
        raise Refused(f"it lacks parameter '{missing[0]}'")
    for name, value in expected.items():
        given = tensors[name]
        if given.shape != value.shape or given.dtype != value.dtype:
            raise Refused(f"'{name}' is {_form(given)} instead of {_form(value)}")
        if not torch.isfinite(given).all():
            raise Refused(f"'{name}' holds values that are not finite")


def _form(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
