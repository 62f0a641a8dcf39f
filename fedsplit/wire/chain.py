"""Which codecs may stand where in the list of a stream."""

from __future__ import annotations

from collections.abc import Sequence

from fedsplit.types import STREAMS, FedsplitError, Stream
from fedsplit.wire.codec import PARAMETERS, Codecs, Stage, squeezes
from fedsplit.wire.delta import Delta
from fedsplit.wire.feedback import Feedback
from fedsplit.wire.recover import Recover


def check(codecs: Codecs) -> None:
    """Whether every list can be had.

    Raises:
        FedsplitError: a stage that remembers on a stream where it cannot, or one in a place where it does not work.
    """
    for stream in STREAMS:
        _check(stream, codecs.get(stream, ()))


def _check(stream: Stream, stages: Sequence[Stage]) -> None:
    kinds = [type(stage) for stage in stages]
    for number, stage in enumerate(stages):
        if squeezes(stage) and number < len(stages) - 1:
            name = type(stage).__name__.lower()
            raise FedsplitError(f"wire.{stream}: {name} works on bytes; name it last.")
        if not hasattr(stage, "echo"):
            continue
        name = type(stage).__name__.lower()
        if stream not in PARAMETERS:
            raise FedsplitError(
                f"wire.{stream}: {name} goes on from the last value of the same tensor, and every message here is "
                "about other samples; name it on parameters only."
            )
        if number and not (kinds[:number] == [Delta] and kinds[number] is Feedback):
            raise FedsplitError(f"wire.{stream}: {name} must see the tensor; name it first (feedback after delta).")
        if number and stream == "parameters-down":
            raise FedsplitError(f"wire.{stream}: delta sends again what was lost, so leave {name} out.")
        if Recover in kinds[number:]:
            raise FedsplitError(
                f"wire.{stream}: {name} must know what the client decodes, and what recover gives depends on the "
                "client's own stale copy; leave one of them out."
            )


def of_shapes_alone(codecs: Codecs) -> Codecs:
    """The codecs without those whose bytes depend on values."""
    return {stream: [stage for stage in stages if not squeezes(stage)] for stream, stages in codecs.items()}
