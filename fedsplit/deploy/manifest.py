"""What a bundle is for and what it holds: its request, its manifest, and the journal of an unfinished one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedsplit.config import Config
from fedsplit.deploy.files import replace
from fedsplit.deploy.wheels import Target
from fedsplit.types import FedsplitError

MANIFEST, JOURNAL = "bundle.json", ".bundle.json"
FORMAT = 1


@dataclass(frozen=True)
class Request:
    """What a bundle is for. `superlink` is host:port; `node` and its `certificates` may be left out together.

    `pins` are exact versions by canonical name; `data` is the device's own folder of train.parquet; `cuda`
    lets a torch that brings CUDA in; `extras` are those of fedsplit, beside `device`.
    """

    config: Config
    folder: Path
    target: Target
    superlink: str
    nodes: int
    pins: Mapping[str, str]
    node: int | None = None
    certificates: Path | None = None
    data: str = ""
    extras: frozenset[str] = frozenset()
    cuda: bool = False


@dataclass(frozen=True)
class Entry:
    """A file of the bundle; `asked` is the requirement that a wheel was downloaded for."""

    sha256: str
    bytes: int
    asked: str = ""


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of the bundle in `folder`; None where there is none, or a damaged one."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def begin(request: Request) -> dict[str, Entry]:
    """Make the folder if it is new; what it holds, by its manifest and by the journal of an unfinished attempt.

    Raises:
        FedsplitError: the folder is no bundle, or one for another machine.
    """
    folder = request.folder
    entries: dict[str, Entry] = {}
    known = False
    for name in (MANIFEST, JOURNAL):  # the journal is the later one
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            there = Target(found["platform"], found["python"])
            entries |= {file: Entry(**entry) for file, entry in found["files"].items()}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError, FedsplitError):
            raise FedsplitError(f"{folder / name} is damaged; give a new folder.") from None
        if there != request.target:
            raise FedsplitError(
                f"{folder} is a bundle for {there.platform} and Python {there.python}; give another folder with --out."
            )
        known = True
    if not known and folder.is_dir() and any(folder.iterdir()):
        raise FedsplitError(f"{folder} holds other files; give a new folder with --out.")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # a device's key will be in it
    (folder / "wheels").mkdir(exist_ok=True)
    replace(folder / JOURNAL, document(request, entries))
    (folder / MANIFEST).unlink(missing_ok=True)  # it is the last to come: without it a bundle is not complete
    return entries


def document(request: Request, files: Mapping[str, Entry], about: Mapping[str, Any] | None = None) -> bytes:
    """A manifest as JSON: what the bundle is for, what is known `about` it, and its files."""
    head = {
        "format": FORMAT,
        "platform": request.target.platform,
        "python": request.target.python,
        "superlink": request.superlink,
        "node": request.node,
        "nodes": request.nodes,
        **(about or {}),
    }
    listed = {name: {k: v for k, v in asdict(entry).items() if v != ""} for name, entry in sorted(files.items())}
    return (json.dumps({**head, "files": listed}, indent=1) + "\n").encode()
