"""The client's half of a model as one file: what a device holds of it, and nothing of the body.

It is a safetensors file of the tensors of front and tail under their global names; its metadata holds the names
of the classes, and the shape of a pruned model. Values that train are there too: the server sends newer ones.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import safetensors

from fedsplit.config import Config
from fedsplit.shelf import durable
from fedsplit.types import FedsplitError, Tensors
from fedsplit.wire.frame import pack
from fedsplit.world import World, world

CLASSES = "classes"


def save(config: Config, path: Path) -> None:
    """Write the client's half of the model of `config`.

    Raises:
        FedsplitError: whatever is wrong with the config, the data or the model, or the file cannot be written.
    """
    built = world(config)
    metadata = {**(built.backbone.metadata or {}), CLASSES: json.dumps(built.data.classes)}
    scratch = path.with_name(f".{path.name}.new")
    try:
        durable(scratch, pack(tensors_of(built), metadata))
        scratch.replace(path)
    except OSError as error:
        raise FedsplitError(f"Cannot write {path}: {error.strerror}; name a file in a folder that exists.") from None


def tensors_of(built: World) -> Tensors:
    """The tensors of front and tail by name, those by which the client reads its own tokens among them."""
    found: Tensors = {}
    for part in (built.parts.front, built.parts.tail, built.short):
        found |= {name.removeprefix("_shell."): value for name, value in part.state_dict().items()}
    return {name: found[name].detach().cpu() for name in sorted(found)}


def frozen_digest(built: World) -> str:
    """SHA-256 of what does not train in front and tail: the server and its devices must have the same."""
    if "frozen" not in built.memo:
        frozen = {name: value for name, value in tensors_of(built).items() if name not in built.trains.names}
        built.memo["frozen"] = hashlib.sha256(pack(frozen)).hexdigest()
    digest: str = built.memo["frozen"]
    return digest


def classes_of(path: Path) -> tuple[str, ...]:
    """The names of the classes that a half was made for.

    Raises:
        FedsplitError: the file is no half.
    """
    try:
        with safetensors.safe_open(path, "pt") as source:
            return tuple(map(str, json.loads((source.metadata() or {})[CLASSES])))
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError):
        raise FedsplitError(f"{path} is not the client's half of a model; make it with fedsplit bundle.") from None
