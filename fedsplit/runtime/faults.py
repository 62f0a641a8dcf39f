"""Faults put into chosen clients and rounds, to see that a run outlives them.

`engine.faults = "kill:3@1, nan:0"` kills client 3 in round 1 and lets client 0 send a NaN in every
round. Rounds and clients are numbered as in `Job`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import time
from dataclasses import dataclass

import torch
from safetensors.torch import load, save

from fedsplit.types import FedsplitError, Job, Tensors, Update, split_names

KINDS = ("raise", "kill", "hang", "nan", "shape", "name", "negative", "zero", "large")
LARGE_BYTES = 64 * 2**20
HANG_S = 24 * 3600.0

_FORM = re.compile(r"([a-z]+):(\d+)(?:@(\d+))?")


@dataclass(frozen=True)
class Fault:
    """`kind` happens to `client` in `round`, or in every round where `round` is None."""

    kind: str
    client: int
    round: int | None = None

    def hits(self, job: Job) -> bool:
        """Whether this fault belongs to the job."""
        return job.client == self.client and self.round in (None, job.round)


def parse(text: str) -> tuple[Fault, ...]:
    """The faults of config key `engine.faults`: `kind:client[@round]`, comma-separated.

    Raises:
        FedsplitError: a malformed entry or an unknown kind.
    """
    faults = []
    for entry in split_names(text):
        found = _FORM.fullmatch(entry)
        if not found or found[1] not in KINDS:
            raise FedsplitError(
                f"engine.faults: '{entry}' is not kind:client or kind:client@round; kinds: {', '.join(KINDS)}."
            )
        faults.append(Fault(found[1], int(found[2]), int(found[3]) if found[3] else None))
    return tuple(faults)


def before(faults: tuple[Fault, ...], job: Job, *, disposable: bool) -> None:
    """What goes wrong before a client works: raise, kill or hang.

    `disposable` says that this process is the client's own: elsewhere `kill` must not take the
    user's process down, and nobody would end a `hang`, so both raise instead.

    Raises:
        RuntimeError: the injected failure.
    """
    for fault in faults:
        if not fault.hits(job) or fault.kind not in ("raise", "kill", "hang"):
            continue
        if disposable and fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if disposable and fault.kind == "hang":
            time.sleep(HANG_S)
        raise RuntimeError(f"injected fault '{fault.kind}' in client {job.client}, round {job.round}")


def after(faults: tuple[Fault, ...], job: Job, update: Update) -> Update:
    """The update as a broken client would send it; untouched where no fault hits the job.

    Raises:
        FedsplitError: the frame holds no tensor that could be corrupted.
    """
    for fault in faults:
        if not fault.hits(job):
            continue
        if fault.kind == "negative":
            update = dataclasses.replace(update, samples=-max(update.samples, 1))
        elif fault.kind == "zero":
            update = dataclasses.replace(update, samples=0)
        elif fault.kind in ("nan", "shape", "name", "large"):
            update = dataclasses.replace(update, up=_corrupt(fault.kind, update.up))
    return update


def _corrupt(kind: str, frame: bytes) -> bytes:
    tensors: Tensors = load(frame)
    if kind == "large":
        tensors["fault"] = torch.zeros(LARGE_BYTES, dtype=torch.uint8)
        return save(tensors, metadata=_metadata(frame))
    names = [
        name
        for name in sorted(tensors)
        if tensors[name].numel() and (kind != "nan" or tensors[name].is_floating_point())
    ]
    if not names:
        raise FedsplitError(f"engine.faults: the update holds no tensor for fault '{kind}'.")
    name = names[0]
    if kind == "name":
        tensors[f"{name}.fault"] = tensors.pop(name)
    elif kind == "shape":
        flat = tensors[name].flatten()
        tensors[name] = torch.cat([flat, flat[:1]])
    else:
        tensors[name].view(-1)[0] = float("nan")
    return save(tensors, metadata=_metadata(frame))


def _metadata(frame: bytes) -> dict[str, str] | None:
    """The text metadata of a safetensors frame, which `load` drops."""
    length = int.from_bytes(frame[:8], "little")
    found: dict[str, str] | None = json.loads(frame[8 : 8 + length]).get("__metadata__")
    return found
