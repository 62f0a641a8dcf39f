"""What clients wrote down, and what the server noted on them, on disk: a file per client and version.

A file never changes and gets its name when it is complete, so whoever holds a `Shelf` may go on reading: a
later round adds files beside the old ones. A checkpoint says which versions were there (`Shelf.as_dict`);
what no checkpoint says any more is swept. In memory there is only the list of versions, whoever idles.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedsplit.types import FedsplitError

Version = tuple[int, int, int]
"""The round that wrote a client's file, the file's length in bytes, and its CRC-32."""


@dataclass(frozen=True)
class Shelf(Mapping[int, bytes]):
    """Bytes by client, read from `folder` when they are asked for; `versions` says which files count."""

    folder: Path
    versions: Mapping[int, Version] = field(default_factory=dict)

    def __getitem__(self, client: int) -> bytes:
        """What is kept of `client`.

        Raises:
            KeyError: nothing is.
            FedsplitError: its file is not as it was written.
        """
        number, length_bytes, checksum = self.versions[client]
        file = self._file(client, number)
        try:
            content = file.read_bytes()
        except OSError:
            content = b""
        if len(content) != length_bytes or zlib.crc32(content) != checksum:
            raise _damaged(file)
        return content

    def __iter__(self) -> Iterator[int]:
        return iter(self.versions)

    def __len__(self) -> int:
        return len(self.versions)

    def put(self, number: int, fresh: Mapping[int, bytes]) -> Shelf:
        """The shelf after round `number`, which wrote `fresh`; a client that has nothing to keep is left out."""
        versions = dict(self.versions)
        for client, content in fresh.items():
            versions.pop(client, None)
            if content:
                self._write(self._file(client, number), content)
                versions[client] = (number, len(content), zlib.crc32(content))
        return Shelf(self.folder, versions)

    def as_dict(self) -> dict[str, Version]:
        """The versions as plain JSON."""
        return {str(client): self.versions[client] for client in sorted(self.versions)}

    @staticmethod
    def read(folder: Path, stored: Mapping[str, Iterable[int]], check: bool = True) -> Shelf:
        """The shelf whose versions are `stored`, as `as_dict` gave them; with `check` their files must be there.

        Raises:
            FedsplitError: a file is missing, or of another length.
            AttributeError, TypeError, ValueError: `stored` is something else.
        """
        versions: dict[int, Version] = {}
        for name, version in stored.items():
            number, length_bytes, checksum = map(int, version)
            versions[int(name)] = (number, length_bytes, checksum)
        shelf = Shelf(folder, versions)
        sizes = _sizes(folder) if check else {}
        for client, (number, length_bytes, _) in versions.items() if check else ():
            file = shelf._file(client, number)
            if sizes.get(file.name) != length_bytes:
                raise _damaged(file)
        return shelf

    def _file(self, client: int, number: int) -> Path:
        return self.folder / f"client-{client:06d}-round-{number:06d}.safetensors"

    def _write(self, file: Path, content: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = file.with_name(f".{file.name}")
        durable(scratch, content)
        os.replace(scratch, file)


def put(frames: Mapping[int, bytes], number: int, fresh: Mapping[int, bytes]) -> Mapping[int, bytes]:
    """`frames` after round `number`, which wrote `fresh`: on disk where `frames` are; empty ones are left out."""
    if isinstance(frames, Shelf):
        return frames.put(number, fresh)
    return {client: frame for client, frame in {**frames, **fresh}.items() if frame}


def sweep(folder: Path, shelves: Iterable[Shelf]) -> None:
    """Remove the files of `folder` that none of its `shelves` needs."""
    needed = {shelf._file(client, kept[0]).name for shelf in shelves for client, kept in shelf.versions.items()}
    for name in _sizes(folder).keys() - needed:
        (folder / name).unlink(missing_ok=True)


def durable(file: Path, content: bytes) -> None:
    """Write `content`, and wait until the disk has it."""
    with file.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _sizes(folder: Path) -> dict[str, int]:
    """The files of a folder and their lengths in bytes; none where there is no folder."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries}
    return {}


def _damaged(file: Path) -> FedsplitError:
    return FedsplitError(f"What a client keeps, {file}, is missing or damaged; bring it back, or start the run anew.")
