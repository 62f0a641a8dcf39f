"""The words of fedsplit, one per idea, as types.

Axes: B batch, N tokens, C channels, H heads, D head size, L blocks, U units, M micro-batches.
Units: a name that ends in `_bytes`, `_s`, `_flops` or `_j` is in bytes, seconds, FLOPs or joules.

*front*: patch embedding and first blocks, at the client. *body*: middle blocks, at the server.
*tail*: last blocks if any, norm and classifier (with the loss), at the client when U-shaped.
*cut*: an address between blocks. *up*: client to server. *down*: server to client.
*keep*: a kept fraction, 1.0 is off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Scalar = int | float | bool | str
Tensors = dict[str, Tensor]
Stream = Literal[
    "activations-up",
    "activations-down",
    "gradients-up",
    "gradients-down",
    "parameters-up",
    "parameters-down",
]
STREAMS: tuple[Stream, ...] = get_args(Stream)


class FedsplitError(Exception):
    """Something the user can mend. The message is one sentence that says how."""


def knob(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """A dataclass field that is also a config key: default, one-line help, range.

    `low` and `high` are inclusive, `above` is an exclusive lower bound.
    """
    meta = {"help": help, "low": low, "above": above, "high": high, "choices": tuple(choices) if choices else None}
    return field(default=default, metadata=meta)


def split_names(text: str) -> tuple[str, ...]:
    """`"a, b"` as `("a", "b")`; empty entries are dropped."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


class Op(IntEnum):
    """What one unit of one block does for one micro-batch; plans combine by minimum."""

    SKIP = 0
    FORWARD = 1
    FULL = 2


@dataclass(frozen=True)
class Plan:
    """What every block and unit does for one micro-batch.

    `ops[l][u]` is the `Op` of unit u of global block l, (L, U); `scale[l]` multiplies what block l adds to
    the residual stream, and is 1 where it is empty. Hashable, so that equal plans share what is made for them.
    """

    ops: tuple[tuple[int, ...], ...]
    scale: tuple[float, ...] = ()

    def row(self, block: int) -> tuple[int, ...]:
        """The ops of a block; one alone where all are the same, which fits a block of any number of units."""
        ops = self.ops[block]
        return ops[:1] if len(set(ops)) == 1 else ops

    def tensors(self) -> Tensors:
        """The plan as it crosses the wire: `ops` (L, U) int8, `scale` (L,) float32 where there is one."""
        ops = {"ops": torch.tensor(self.ops, dtype=torch.int8)}
        return ops | ({"scale": torch.tensor(self.scale)} if self.scale else {})

    @staticmethod
    def read(tensors: Mapping[str, Tensor]) -> Plan | None:
        """What `tensors` wrote; None where there is no plan."""
        if "ops" not in tensors:
            return None
        scale = tensors["scale"].tolist() if "scale" in tensors else ()
        return Plan(tuple(map(tuple, tensors["ops"].tolist())), tuple(scale))


@dataclass(frozen=True)
class Order:
    """How a step is to be taken: by `plan`, and, where `probe` is the (L, U) of the model, with scores of its units.

    It travels beside the activations; the ordinary one is empty.
    """

    plan: Plan | None = None
    probe: tuple[int, ...] = ()

    def tensors(self) -> Tensors:
        """The order as it crosses the wire."""
        probe = {"probe": torch.tensor(self.probe)} if self.probe else {}
        return (self.plan.tensors() if self.plan else {}) | probe

    @staticmethod
    def read(tensors: Mapping[str, Tensor]) -> Order:
        """What `tensors` wrote."""
        return Order(Plan.read(tensors), tuple(tensors["probe"].tolist()) if "probe" in tensors else ())


ORDINARY = Order()


@dataclass(frozen=True)
class Cut:
    """Where the model is cut: `front` blocks at the client, `tail` blocks last, of `depth`."""

    front: int
    tail: int
    depth: int

    def __post_init__(self) -> None:
        if self.front < 0 or self.tail < 0 or self.front + self.tail > self.depth:
            raise FedsplitError(
                f"cut.front={self.front} and cut.tail={self.tail} do not fit a model of "
                f"{self.depth} blocks: their sum must be between 0 and {self.depth}."
            )

    @property
    def body(self) -> range:
        """Global numbers of the body's blocks."""
        return range(self.front, self.depth - self.tail)


@dataclass(frozen=True)
class Batch:
    """Images `x` (B, 3, height, width) float32, labels `y` (B,) int64, sample `ids` (B,) int64.

    Where the front is frozen, `x` may be its tokens (B, N, C), kept from an earlier pass.
    """

    x: Tensor
    y: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Images:
    """A labelled image set: `pixels` (S, height, width, 3) uint8, `labels` (S,) int64.

    `pixels` may be memory-mapped and must not be written to. `groups` (S,) is the natural
    identifier of a sample (a writer, a camera) where the source has one.
    """

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    groups: npt.NDArray[np.str_] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DataSet:
    """A train and a test set with the names of their classes."""

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """One client's work in one round, as the server sends it.

    `down` is the serialised parameter frame that crosses the wire. `server` is the state of the
    client's server-side part (body parameters, server optimiser): it stays at the server in a
    deployment, travels only inside a simulation, and is never counted. `memory` is what the client
    wrote down for itself in its last round: it stays at the client in a deployment. `notes` is what the
    server wrote down about this client: like `server` it travels only inside a simulation. `choices` are
    config keys, as JSON, that the controllers set for this client and round.
    """

    client: int
    round: int
    attempt: int
    down: bytes
    server: bytes
    memory: bytes = b""
    notes: bytes = b""
    choices: str = ""


@dataclass(frozen=True)
class Update:
    """What a client's round gives back; `up`, `server`, `memory` and `notes` mirror those of `Job`."""

    client: int
    samples: int
    up: bytes
    server: bytes
    report: Report
    memory: bytes = b""
    notes: bytes = b""


@dataclass(frozen=True)
class Failure:
    """A client that did not finish its round, and why."""

    client: int
    reason: str


@dataclass(frozen=True)
class Report:
    """The figures of one client's round; sums over its steps unless the name says otherwise.

    `local_loss` is the mean of the last epoch of the local phase, `local_accuracy` that of front joined
    to tail after it, on the client's own samples; None where there was no such phase or no scoring.
    `computed_samples` passed through the frozen front, which the others left out; `stored_bytes` is what
    the device then keeps of its outputs, in memory (counted in its peak) and on disk. Of `client_flops`,
    `client_infer_flops` only go forward; `local_flops`, and of these `local_infer_flops`, come before the split steps.

    Of plans: `probe_steps` ran in full to be scored; `units` counts by `block.unit.op` how often units ran
    forward only or in full; `workload_variance` is that of the server workers' loads, as fractions of a full
    load; `gradient_cosine` compares one step's gradient at the cut with the exact one.

    `bytes` are those that crossed the wire, by stream, `raw_bytes` what they were without codecs. Where weights
    come down to be recovered, `recover_error` is how far they then are from those at the server, and `stale_error`
    how far the client's stale copy is: relative L2 errors.
    """

    steps: int = 0
    kept_samples: int = 0
    train_loss: float = 0.0
    local_steps: int = 0
    local_loss: float | None = None
    local_accuracy: float | None = None
    scored_samples: int = 0
    computed_samples: int = 0
    personal_accuracy: float | None = None
    personal_samples: int = 0
    probe_steps: int = 0
    units: Mapping[str, int] = field(default_factory=dict)
    workload_variance: float | None = None
    gradient_cosine: float | None = None
    bytes: Mapping[str, int] = field(default_factory=dict)
    raw_bytes: Mapping[str, int] = field(default_factory=dict)
    recover_error: float | None = None
    stale_error: float | None = None
    messages: int = 0
    client_flops: int = 0
    client_infer_flops: int = 0
    local_flops: int = 0
    local_infer_flops: int = 0
    server_flops: int = 0
    client_peak_bytes: int = 0
    server_peak_bytes: int = 0
    stored_bytes: int = 0
    wall_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a message or a CSV row."""
        counts = {"bytes": dict(self.bytes), "raw_bytes": dict(self.raw_bytes), "units": dict(self.units)}
        return dataclasses.asdict(self) | counts
