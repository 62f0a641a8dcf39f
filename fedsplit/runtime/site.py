"""What a device of a deployment knows of itself: who it is, what is its own, and where that lies."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsplit.config import Config
from fedsplit.data.sources import own_pictures
from fedsplit.front.models import input_size
from fedsplit.runtime import half
from fedsplit.types import FedsplitError
from fedsplit.world import World, halved, world

NODE_KEYS = ("partition-id", "num-partitions", "state", "half", "data", "root-certificates", "cache", "plaintext")


@dataclass(frozen=True)
class Site:
    """What a device knows of itself: the node config of its SuperNode.

    It is device `partition` of `partitions`; several devices of a run, where there are more than SuperNodes, are
    dealt to them in turn. `half` is the file with its part of the model, without which it builds the whole one;
    `data` is a folder with a train.parquet of its own, without which it takes its shard of `data.source`.
    """

    partition: int
    partitions: int
    state: Path
    half: Path | None
    data: Path | None
    root_certificates: Path | None
    cache: str
    plaintext: bool

    @staticmethod
    def read(node_config: Mapping[str, Any]) -> Site:
        """The site that a node config describes.

        Raises:
            FedsplitError: a key is missing or unknown, or has an impossible value.
        """
        unknown = sorted(set(node_config) - set(NODE_KEYS))
        if unknown:
            raise FedsplitError(f"The node config has a key '{unknown[0]}'; known: {', '.join(NODE_KEYS)}.")
        number, count = node_config.get("partition-id"), node_config.get("num-partitions")
        if type(number) is not int or type(count) is not int or not 0 <= number < count:
            raise FedsplitError(
                "The node config must say which device this is: --node-config 'partition-id=0 num-partitions=2'."
            )

        def path(name: str) -> Path | None:
            text = str(node_config.get(name, ""))
            return Path(text).expanduser().absolute() if text else None

        return Site(
            number,
            count,
            path("state") or Path.home() / ".fedsplit" / f"device-{number}",
            path("half"),
            path("data"),
            path("root-certificates"),
            str(node_config.get("cache", "")),
            bool(node_config.get("plaintext", False)),
        )

    def key(self) -> Ed25519PrivateKey:
        """This device's key for the stream, made the first time.

        Raises:
            FedsplitError: its file cannot be read or written.
        """
        file = self.state / "stream.key"
        try:
            if not file.exists():
                _write_key(file)
            found = serialization.load_pem_private_key(file.read_bytes(), None)
        except (OSError, ValueError) as error:
            why = f"The device's key {file} cannot be used ({error})"
            raise FedsplitError(f"{why}; set 'state' in its node config to a folder of its own.") from None
        if not isinstance(found, Ed25519PrivateKey):
            raise FedsplitError(f"The device's key {file} is not an Ed25519 key; remove it, and it is made anew.")
        return found

    def introduction(self) -> dict[str, Any]:
        """What the server is told of this device, as plain values."""
        return {
            "partition": self.partition,
            "partitions": self.partitions,
            "public-key": self.key().public_key().public_bytes_raw(),
        }

    def world(self, config: Config, client: int) -> World:
        """The world of `config` as this device has it."""
        if self.cache:
            config = config.replace(data__cache=self.cache)
        if self.half is None:
            if self.data is not None:
                raise FedsplitError("A device with data of its own needs its half of the model: see fedsplit bundle.")
            return world(config)
        if self.data is None:
            return halved(config, self.half)
        pictures = own_pictures(config.data, self.data, input_size(config.model), half.classes_of(self.half))
        nobody = np.arange(0)
        shards = [nobody] * (config.devices.count or self.partitions)
        shards[client] = np.arange(len(pictures.train))
        return halved(config, self.half, (pictures, shards))


def _write_key(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    try:
        os.link(scratch, file)  # whoever came first: its key stays
    except FileExistsError:
        pass
    finally:
        scratch.unlink()
