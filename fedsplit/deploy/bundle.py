"""A folder with everything that a device needs to join a federation without a network but that of its server."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedsplit.config import to_toml
from fedsplit.deploy import node as device
from fedsplit.deploy import own_wheel, wheels
from fedsplit.deploy.files import PRIVATE, PROGRAM, PUBLIC, replace, sha256
from fedsplit.deploy.inputs import keys_of
from fedsplit.deploy.manifest import JOURNAL, MANIFEST, Entry, Request, begin, document
from fedsplit.types import FedsplitError

HALF = "half.safetensors"
MIB = 2**20

Say = Callable[[str], None]


def make(request: Request, say: Say = print, fetch: wheels.Fetch | None = None) -> Path:
    """Make the bundle, or what is missing of it, and say what is done; returns the folder.

    A wheel that is there with the digest noted when it came is not fetched again. Every file appears complete, the
    manifest last.

    Raises:
        FedsplitError: a key or wheel that cannot be had, a host that the certificate does not name, or a folder
            that is no bundle for this machine.
    """
    keys = keys_of(request)
    try:
        before = begin(request)
        with _scratch(request.folder) as scratch:
            return _Maker(request, say, fetch or wheels.download, before, scratch).make(keys)
    except OSError as error:
        raise FedsplitError(f"Cannot write {error.filename or request.folder}: {error.strerror}.") from None


class _Maker:
    def __init__(
        self, request: Request, say: Say, fetch: wheels.Fetch, before: Mapping[str, Entry], scratch: Path
    ) -> None:
        self._request, self._folder, self._say, self._fetch = request, request.folder, say, fetch
        self._scratch = scratch
        self._there = {entry.asked: name for name, entry in before.items() if entry.asked}
        self._before = before
        self._files: dict[str, Entry] = {}

    def make(self, keys: tuple[bytes, bytes] | None) -> Path:
        request = self._request
        self._say("[1/4] wheels")
        extras = {"device", *request.extras}
        own = self._own_wheel()
        wheels.closure(own, extras, request.target, request.pins, self._get, request.cuda)
        self._sweep()
        self._say("[2/4] the client's half of the weights")
        self._half()
        self._say("[3/4] config, keys, unit and script")
        requirement = f"fedsplit[{','.join(sorted(extras))}]=={own.name.split('-')[1]}"
        self._texts(keys, requirement)
        self._say("[4/4] manifest")
        self._manifest(requirement)
        size = sum(entry.bytes for entry in self._files.values())
        self._say(f"{len(self._files)} files, {size / MIB:.1f} MiB")
        return self._folder

    def _own_wheel(self) -> Path:
        built = own_wheel.build(self._scratch)
        final = self._folder / "wheels" / built.name
        built.chmod(PUBLIC)
        os.replace(built, final)
        self._note(f"wheels/{final.name}", Entry(sha256(final), final.stat().st_size))
        return final

    def _get(self, asked: str) -> Path:
        """The wheel of a requirement: the one that is there, or a new one."""
        name = self._there.get(asked)
        if name and _intact(self._folder / name, self._before[name]):
            self._note(name, self._before[name])
            self._say(f"  {len(self._files):3d}  {Path(name).name}  (there)")
            return self._folder / name
        got = self._fetch(asked, self._request.target, self._scratch)
        final = self._folder / "wheels" / got.name
        entry = Entry(sha256(got), got.stat().st_size, asked)
        got.chmod(PUBLIC)
        os.replace(got, final)
        self._note(f"wheels/{final.name}", entry)
        self._say(f"  {len(self._files):3d}  {final.name}  {entry.bytes / MIB:.1f} MiB")
        return final

    def _note(self, name: str, entry: Entry) -> None:
        """Write down what is there, for a next time that goes on from here."""
        self._files[name] = entry
        known = {**{name: entry for name, entry in self._before.items() if entry.asked}, **self._files}
        replace(self._folder / JOURNAL, document(self._request, known))

    def _sweep(self) -> None:
        """Remove wheels that are not part of it any more: pip would choose the newest it finds."""
        for file in (self._folder / "wheels").iterdir():
            if f"wheels/{file.name}" not in self._files:
                file.unlink()

    def _half(self) -> None:
        try:
            from fedsplit.runtime import half
        except ImportError as error:
            raise FedsplitError(
                f"The client's half needs the package '{error.name}': pip install 'fedsplit[device]'."
            ) from error
        made = self._scratch / HALF
        half.save(self._request.config, made)
        made.chmod(PUBLIC)
        os.replace(made, self._folder / HALF)
        self._add(HALF)

    def _texts(self, keys: tuple[bytes, bytes] | None, requirement: str) -> None:
        request = self._request
        # Folders of this machine mean nothing on a device.
        config = to_toml({**request.config.values, "out": "", "resume": ""})
        self._write("config.toml", config.encode(), PUBLIC)
        script = device.install_script(request.target, requirement, request.superlink)
        self._write("install.sh", script.encode(), PROGRAM)
        if keys is None or request.node is None:
            for name in ("ca.crt", "node.key", device.UNIT):
                (self._folder / name).unlink(missing_ok=True)
            return
        self._write("ca.crt", keys[0], PUBLIC)
        self._write("node.key", keys[1], PRIVATE)
        given = device.node_config(request.node, request.nodes, request.data)
        self._write(device.UNIT, device.unit(request.superlink, given).encode(), PUBLIC)

    def _write(self, name: str, content: bytes, mode: int) -> None:
        replace(self._folder / name, content, mode)
        self._add(name)

    def _add(self, name: str) -> None:
        file = self._folder / name
        self._files[name] = Entry(sha256(file), file.stat().st_size)

    def _manifest(self, requirement: str) -> None:
        from fedsplit.doctor.device import client_memory_bytes

        try:
            memory: int | None = client_memory_bytes(self._request.config)
        except FedsplitError as error:
            memory = None
            self._say(f"  what a client holds in memory is not known: {error}")
        about = {"requirement": requirement, "client_memory_bytes": memory}
        replace(self._folder / MANIFEST, document(self._request, self._files, about))
        (self._folder / JOURNAL).unlink(missing_ok=True)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    for left in folder.glob(".scratch.*"):  # of an attempt that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".scratch.", dir=folder) as name:
        yield Path(name)


def _intact(file: Path, entry: Entry) -> bool:
    return file.is_file() and file.stat().st_size == entry.bytes and sha256(file) == entry.sha256
