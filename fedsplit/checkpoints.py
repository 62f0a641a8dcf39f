"""A run's checkpoints: complete under their final name, or not there at all.

A checkpoint holds the model, the server's optimiser and what controllers remember. What clients keep is on
the shelves beside it (`fedsplit.shelf`), and a checkpoint only says which versions of it were there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedsplit.round import State
from fedsplit.shelf import Shelf, durable, sweep
from fedsplit.types import FedsplitError, Tensors
from fedsplit.wire.frame import pack, unpack

KEEP = 2
SHELVES = ("memory", "notes")
"""The fields of a `State` that are kept by client."""


def names(run: Path) -> list[Path]:
    """The checkpoints of the run folder `run`, the newest last."""
    return sorted((run / "checkpoint").glob("round-*"))


def shelved(run: Path, state: State) -> State:
    """`state` with what is kept by client on the shelves of `run`."""
    fresh = {name: frames for name in SHELVES if not isinstance(frames := getattr(state, name), Shelf)}
    moved: dict[str, Any] = {name: Shelf(_folder(run, name)).put(state.round, fresh[name]) for name in fresh}
    return replace(state, **moved)


def save(run: Path, state: State) -> None:
    """Write the checkpoint of `state`; older ones than the last two, and what only they referred to, go."""
    state = shelved(run, state)
    final = run / "checkpoint" / f"round-{state.round:06d}"
    scratch = final.with_name(f".{final.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    model = {f"model|{name}": value for name, value in state.model.items()}
    frame = pack(model | {f"optim|{name}": value for name, value in state.optimizer.items()})
    about = {"round": state.round, "sha256": sha256(state.model), "control": dict(state.control)}
    about["clock_s"] = state.clock_s
    about |= {name: getattr(state, name).as_dict() for name in SHELVES}
    durable(scratch / "state.safetensors", frame)
    durable(scratch / "round.json", json.dumps(about).encode())
    shutil.rmtree(final, ignore_errors=True)
    scratch.rename(final)
    tidy(run)


def tidy(run: Path) -> None:
    """Remove all checkpoints but the last two, and what no checkpoint refers to."""
    for old in names(run)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    for name in SHELVES:
        sweep(_folder(run, name), _referred(run, name))


def read(run: Path, folder: Path) -> State:
    """The state that the checkpoint `folder` of `run` holds.

    Raises:
        FedsplitError: it is damaged, or was written before clients had shelves.
    """
    try:
        tensors = unpack((folder / "state.safetensors").read_bytes())
        about = json.loads((folder / "round.json").read_text())
        parts: dict[str, Tensors] = {"model": {}, "optim": {}, "client": {}, "notes": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition("|")
            parts[part][rest] = value
        if about["sha256"] != sha256(parts["model"]):
            raise ValueError("another digest")
        memory, notes = (Shelf.read(_folder(run, name), about.get(name, {})) for name in SHELVES)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, FedsplitError):
        raise FedsplitError(f"The checkpoint {folder} is damaged; delete it to go on from the one before.") from None
    if parts["client"] or parts["notes"]:
        raise FedsplitError(
            f"The checkpoint {folder} holds the memory of clients as an earlier fedsplit wrote it; "
            "go on with that version, or start the run anew."
        )
    control, clock_s = about.get("control", {}), about.get("clock_s", 0.0)
    return State(about["round"], parts["model"], parts["optim"], memory, notes, control, clock_s)


def sha256(tensors: Mapping[str, Any]) -> str:
    """A digest of named tensors, whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _folder(run: Path, name: str) -> Path:
    return run / "clients" / name


def _referred(run: Path, name: str) -> Iterator[Shelf]:
    """The shelves of that name that checkpoints refer to; a damaged one refers to nothing."""
    for folder in names(run):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            about = json.loads((folder / "round.json").read_text())
            yield Shelf.read(_folder(run, name), about[name], check=False)
