"""Pieces of your own, in a file outside this package.

The file defines pieces as CONTRIBUTING.md describes, and says where they stand:

    PIECES = {"front.edits": {"clip": Clip}}

`FEDSPLIT_PIECES=clip.py` (several with the system's path separator) plugs it into every command, process and Ray
actor that inherits the environment; `plug("clip.py")` does so in a notebook. From then on its keys are keys like all
others, except under plain `flwr run`, whose `--run-config` takes the keys of pyproject.toml alone. A run notes the
file's name and digest in config.toml.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from fedsplit.types import FedsplitError

VARIABLE = "FEDSPLIT_PIECES"
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")

# What was plugged: the file, its digest, and what it registered as (list key, name).
_plugged: dict[Path, tuple[str, tuple[tuple[str, str], ...]]] = {}


def plug(file: str | Path) -> tuple[str, ...]:
    """Register the pieces of `file`, here and in processes started from now on; once more after it was changed.

    Returns:
        The pieces, as 'front.edits=clip'.

    Raises:
        FedsplitError: the file cannot be read or run, or names a place or a piece that cannot be.
    """
    found = _register(Path(file))
    paths = [path for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]
    if str(Path(file).resolve()) not in paths:
        os.environ[VARIABLE] = os.pathsep.join([*paths, str(Path(file).resolve())])
    return found


def from_environment() -> None:
    """Register what `FEDSPLIT_PIECES` names and is not registered yet.

    Raises:
        FedsplitError: as `plug`.
    """
    paths = [Path(path).resolve() for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]
    for path in paths:
        if path not in _plugged:
            _register(path)
    if paths:  # processes that this one starts may work in another folder
        os.environ[VARIABLE] = os.pathsep.join(map(str, paths))


def plugged() -> str:
    """Names and digests of the files whose pieces are registered; empty when there are none."""
    return ", ".join(f"{path.name} {digest[:12]}" for path, (digest, _) in sorted(_plugged.items()))


def _register(path: Path) -> tuple[str, ...]:
    from fedsplit import config, places

    path = path.resolve()
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise FedsplitError(f"Cannot read the pieces of {path}: {error.strerror}; mend {VARIABLE}.") from None
    lists: dict[str, dict[str, Any]] = {
        place.key: place.pieces  # type: ignore[misc]
        for place in (*places.PLACES, *places.STUDIES)
    }
    mine = _plugged.get(path, ("", ()))[1]
    wanted = _wanted(path, _run(path), lists, mine)
    for key, name in mine:
        lists[key].pop(name, None)
    for (key, name), piece in wanted.items():
        lists[key][name] = piece
    _plugged[path] = (digest, tuple(wanted))
    config.keys.cache_clear()
    return tuple(f"{key}={name}" for key, name in wanted)


def _run(path: Path) -> ModuleType:
    """The file as a module."""
    name = f"fedsplit_pieces_{re.sub(r'[^a-zA-Z0-9]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FedsplitError(f"{path} is not a Python file; pieces stand in a file that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise FedsplitError(f"The pieces of {path} cannot be loaded: {type(error).__name__}: {error}.") from error
    return module


def _wanted(
    path: Path, module: ModuleType, lists: Mapping[str, Mapping[str, Any]], mine: tuple[tuple[str, str], ...]
) -> dict[tuple[str, str], type[Any]]:
    """The pieces of the file by list key and name, checked."""
    asked = getattr(module, "PIECES", None)
    if not isinstance(asked, dict) or not asked:
        raise FedsplitError(f'{path} names no pieces; it needs PIECES = {{"front.edits": {{"my-name": MyPiece}}}}.')
    wanted: dict[tuple[str, str], type[Any]] = {}
    for key, pieces in asked.items():
        if key not in lists:
            raise FedsplitError(f"{path}: there is no place '{key}'; known: {', '.join(lists)}.")
        for name, piece in pieces.items():
            if not NAME.fullmatch(name):
                raise FedsplitError(f"{path}: '{name}' is no name of a piece; use lower case and hyphens.")
            if name in lists[key] and (key, name) not in mine:
                raise FedsplitError(f"{path}: {key} has a piece '{name}' already; choose another name.")
            if not (isinstance(piece, type) and dataclasses.is_dataclass(piece) and _frozen(piece)):
                raise FedsplitError(f"{path}: '{name}' must be a frozen dataclass whose fields are knob(...)s.")
            if plain := [field.name for field in dataclasses.fields(piece) if "help" not in field.metadata]:
                raise FedsplitError(f"{path}: field '{plain[0]}' of '{name}' must be a knob(...), with its help.")
            wanted[key, name] = piece
    return wanted


def _frozen(piece: Any) -> bool:
    return bool(piece.__dataclass_params__.frozen)
