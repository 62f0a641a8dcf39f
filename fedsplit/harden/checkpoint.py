"""Where a hardening stands, on disk: one file, complete or not there at all."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsplit.pretrain.checkpoint import write_bytes
from fedsplit.types import FedsplitError, Tensors

_PLAIN = (type(None), bool, int, float, str, bytes, Tensor)


@dataclass
class Position:
    """How far a hardening is: epochs done, whether the removal is, and what was measured on the way.

    Random streams are keyed by epoch and step, so it is their position too.
    """

    epoch: int = 0
    removed: bool = False
    figures: dict[str, Any] = field(default_factory=dict)


def save(
    folder: Path, position: Position, tensors: Mapping[str, Tensors], shape: str, memory: Mapping[str, Any]
) -> None:
    """Write the state; it replaces the last one when it is on the disk.

    `memory` is that of the penalties by name: tensors, numbers, text, and lists and dictionaries of them.

    Raises:
        FedsplitError: a penalty's memory is something else.
    """
    for name, held in memory.items():
        if not _is_plain(held):
            raise FedsplitError(
                f"front.penalties: what '{name}' remembers cannot be kept in a checkpoint; let it remember tensors, "
                "numbers, text, and lists and dictionaries of them, or give it pack(memory) and unpack(plain)."
            )
    content = io.BytesIO()
    state = {"position": json.dumps(asdict(position)), "shape": shape, "memory": dict(memory), **tensors}
    torch.save(state, content)
    write_bytes(_file(folder), content.getvalue())


def read(folder: Path) -> tuple[Position, dict[str, Any]] | None:
    """What `save` wrote, each tensor where it was; None where there is none. No code in the file is run.

    Raises:
        FedsplitError: the file is no such checkpoint.
    """
    file = _file(folder)
    if not file.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(file, weights_only=True)
        return Position(**json.loads(state.pop("position"))), state
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError):
        raise FedsplitError(f"{file} is not a checkpoint of fedsplit harden; delete {folder} and start anew.") from None


def _file(folder: Path) -> Path:
    return folder / "checkpoint" / "state.pt"


def _is_plain(held: Any) -> bool:
    if isinstance(held, dict):
        return all(type(name) in (str, int) and _is_plain(value) for name, value in held.items())
    if isinstance(held, list | tuple):
        return all(_is_plain(value) for value in held)
    return type(held) in (*_PLAIN, torch.nn.Parameter)
