"""Where a pre-training run stands, on disk: one file, complete or not there at all."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fedsplit.types import FedsplitError, Tensors


@dataclass
class Position:
    """How far a run is. Random streams are keyed by step and epoch, so it is their position too.

    `trained_s` is the time in training steps, `wall_s` all time; `row_step` and `row_s` are step and
    `trained_s` of the last row of the log. The loss since that row is kept beside, as a tensor.
    """

    step: int = 0
    trained_s: float = 0.0
    wall_s: float = 0.0
    row_step: int = 0
    row_s: float = 0.0


def save(folder: Path, position: Position, loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the state; it replaces the last one when it is on the disk."""
    tensors: Tensors = {f"model|{name}": value for name, value in model.state_dict().items()}
    for number, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optim|{number}|{slot}": value for slot, value in slots.items()}
    tensors["loss"] = loss
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {"position": json.dumps(dataclasses.asdict(position))}
    write_bytes(_file(folder), safetensors.torch.save(plain, metadata))


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Position, Tensor] | None:
    """Put the state back into `model` and `optimizer`; None when there is none.

    Raises:
        FedsplitError: the file is no checkpoint of this network.
    """
    file = _file(folder)
    if not file.is_file():
        return None
    try:
        with safetensors.safe_open(file, "pt") as source:
            position = Position(**json.loads(source.metadata()["position"]))
        tensors = safetensors.torch.load_file(file)
        states: dict[int, Tensors] = {}
        for name in (name for name in tensors if name.startswith("optim|")):
            _, number, slot = name.split("|")
            states.setdefault(int(number), {})[slot] = tensors[name]
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": states, "param_groups": groups})
        prefix = "model|"
        model.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        return position, tensors["loss"]
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise FedsplitError(
            f"{file} is not a checkpoint of this run ({reason}); delete {folder} and start anew."
        ) from None


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file durably: the old content or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.new")
    with scratch.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    os.replace(scratch, path)


def _file(folder: Path) -> Path:
    return folder / "checkpoint" / "state.safetensors"
