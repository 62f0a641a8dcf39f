"""What a device keeps from round to round, on its own disk: personal layers, chosen samples, stale weights.

The server holds a receipt for it, the digest of a file, and sends it with the next job: so a device goes on from
the round that the server counted, whatever happened to later ones, and after a restart or a kill of its process.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

from fedsplit.shelf import durable
from fedsplit.types import FedsplitError
from fedsplit.wire.frame import pack, unpack

RECEIPT = "receipt|sha256"
MOST_BYTES = 4096


class Drawer:
    """The files of one client below `folder`; the last `keep` stay."""

    def __init__(self, folder: Path, client: int, keep: int) -> None:
        self._folder = folder / "clients" / f"{client:06d}"
        self._keep = keep

    def read(self, receipt: bytes) -> bytes:
        """What was written for `receipt`; nothing for an empty one.

        Raises:
            FedsplitError: the file is gone or damaged, or these bytes are no receipt.
        """
        if not receipt:
            return b""
        name = _digest_in(receipt)
        try:
            content = self._file(name).read_bytes()
        except OSError:
            content = b""
        if hashlib.sha256(content).hexdigest() != name:
            raise FedsplitError(
                f"What this device kept for client {int(self._folder.name)} is missing or damaged in {self._folder}; "
                "bring it back, or start the run anew."
            )
        os.utime(self._file(name))
        return content

    def write(self, content: bytes) -> bytes:
        """Keep `content`, complete or not at all; its receipt. Nothing needs none.

        Raises:
            FedsplitError: the disk does not take it.
        """
        if not content:
            return b""
        name = hashlib.sha256(content).hexdigest()
        scratch = self._folder / f".{name}.new"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            durable(scratch, content)
            os.replace(scratch, self._file(name))
            self._tidy()
        except OSError as error:
            scratch.unlink(missing_ok=True)
            why = f"This device cannot keep {len(content)} bytes in {self._folder} ({error.strerror})"
            raise FedsplitError(f"{why}; free space, or set 'state' in its node config.") from None
        return pack({RECEIPT: torch.frombuffer(bytearray.fromhex(name), dtype=torch.uint8)})

    def _tidy(self) -> None:
        files = sorted(self._folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
        for file in files[: -self._keep]:
            file.unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


def check_receipt(receipt: bytes) -> None:
    """Whether the server may keep what a device sent as its receipt.

    Raises:
        FedsplitError: it is none.
    """
    if receipt:
        _digest_in(receipt)


def _digest_in(receipt: bytes) -> str:
    found = unpack(receipt) if len(receipt) <= MOST_BYTES else {}
    digest = found.get(RECEIPT)
    if digest is None or len(found) > 1 or digest.dtype is not torch.uint8 or digest.shape != (32,):
        raise FedsplitError("What should be a receipt is none; server and device must run the same fedsplit.")
    return bytes(digest.tolist()).hex()
