"""What an update must be before it may touch the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from fedsplit.types import FedsplitError, Tensors, Update
from fedsplit.wire.frame import unpack
from fedsplit.wire.link import Link
from fedsplit.wire.parts import finite


class Refused(Exception):
    """An update that is not let in; the message says why."""


def admit(
    update: Update,
    link: Link,
    client: Mapping[str, torch.Tensor],
    server: Mapping[str, torch.Tensor],
    limit: int,
    may_lack: Collection[str] = (),
) -> tuple[Tensors, Tensors, Tensors]:
    """The client's, the server-side and the noted tensors of `update`, checked against those the round began with.

    Tensors of `may_lack` may be missing on either side; the notes must hold just those that the server's
    side then lacks.

    Raises:
        Refused: too many bytes, an impossible sample count, bytes that are no frame, wrong names,
            shapes or types, or values that are not finite.
    """
    if type(update.samples) is not int or update.samples <= 0:
        raise Refused(f"it counts {update.samples} samples")
    if len(update.up) > limit:
        raise Refused(f"its update of {len(update.up)} bytes is over the limit of {limit}")
    try:
        tensors = link.decode("parameters-up", update.up, {name: x.shape for name, x in client.items()})
        state, notes = unpack(update.server), unpack(update.notes)
    except Exception as error:  # whatever a codec says to bytes it did not expect
        raise Refused(str(error) if isinstance(error, FedsplitError) else f"{type(error).__name__}: {error}") from None
    _check(tensors, client, may_lack)
    _check({name: x for name, x in state.items() if "|" not in name}, server, may_lack)
    _check(notes, {name: x for name, x in server.items() if name not in state})
    for name, moment in state.items():
        if not finite(moment):
            raise Refused(f"'{name}' holds values that are not finite")
    return tensors, state, notes


def _check(tensors: Tensors, expected: Mapping[str, torch.Tensor], may_lack: Collection[str] = ()) -> None:
    unknown = sorted(set(tensors) - set(expected))
    missing = sorted(set(expected) - set(tensors) - set(may_lack))
    if unknown:
        raise Refused(f"it names a parameter '{unknown[0]}' that was not asked for")
    if missing:
        raise Refused(f"it lacks parameter '{missing[0]}'")
    for name, given in tensors.items():
        value = expected[name]
        if given.shape != value.shape or given.dtype != value.dtype:
            raise Refused(f"'{name}' is {_form(given)} instead of {_form(value)}")
        if not finite(given):
            raise Refused(f"'{name}' holds values that are not finite")


def _form(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
