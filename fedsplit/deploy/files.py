"""Files that are complete under their final name, or not there at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedsplit.types import FedsplitError

PRIVATE, PUBLIC, PROGRAM = 0o600, 0o644, 0o755
_CHUNK = 1 << 20


def create(file: Path, content: bytes, mode: int = PUBLIC) -> None:
    """Write a file that is not there yet; one that is stays as it is.

    Raises:
        FedsplitError: there is such a file already, or the folder takes none.
    """
    with _scratch(file, content, mode) as scratch:
        try:
            os.link(scratch, file)  # unlike a rename it fails where the name is taken
        except FileExistsError:
            raise FedsplitError(f"{file} is there already and is not overwritten; give another folder.") from None


def replace(file: Path, content: bytes, mode: int = PUBLIC) -> None:
    """Write a file in the place of whatever had its name.

    Raises:
        FedsplitError: the folder takes no file.
    """
    with _scratch(file, content, mode) as scratch:
        os.replace(scratch, file)


def sync(folder: Path) -> None:
    """Wait until the disk has the names in `folder`."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(file: Path) -> str:
    """The digest of a file, read a piece at a time."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while piece := content.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def _scratch(file: Path, content: bytes, mode: int) -> Iterator[Path]:
    """A file of `content` beside `file`, readable by its owner alone until it is complete; gone afterwards."""
    name = ""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)  # mode 0600
        with os.fdopen(handle, "wb") as out:
            out.write(content)
            out.flush()
            os.fchmod(out.fileno(), mode)
            os.fsync(out.fileno())
        yield Path(name)
        sync(file.parent)
    except OSError as error:
        raise FedsplitError(f"Cannot write {file}: {error.strerror}.") from None
    finally:
        if name:
            with suppress(FileNotFoundError):
                os.unlink(name)
