"""Devices that are broken, or mean harm, at a body that is served: each stands in for `device.work` in one round."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedsplit.config import Config
from fedsplit.deploy.certificates import certify
from fedsplit.runtime import device, drawer
from fedsplit.runtime.inprocess import Loop
from fedsplit.runtime.site import Site
from fedsplit.runtime.stream.packet import Kind
from fedsplit.types import Failure, Job, Scalar, Update
from fedsplit.wire.frame import pack

BROKEN, ROUND = 1, 1
TINY: dict[str, Scalar] = {
    "data.alpha": 1.0,
    "model.dropout": 0.1,
    "optimizer.name": "adamw",
    "optimizer.lr": 0.001,
    "wire.activations-up": "half",
    "model.name": "fedsplit_nano",
    "model.pretrained": False,
    "cut.front": 1,
    "rounds": 2,
    "data.limit": 48,
    "data.test-limit": 10,
    "data.partition": "iid",
    "devices.count": 3,
    "devices.per-round": 3,
    "local.batch-size": 8,
    "share.quorum": 0.5,
    "wire.parameters-up": "delta,feedback,topk",  # the devices have something to keep
}


@dataclass
class Without(Loop):
    """A fleet in which some clients were not there in some rounds: `absent` holds (client, round)."""

    absent: Collection[tuple[int, int]] = ((BROKEN, ROUND),)

    def run(self, jobs: Sequence[Job]) -> Iterator[Update | Failure]:
        """One result per job of those who are there."""
        return super().run([job for job in jobs if (job.client, job.round) not in self.absent])


MOST_BYTES = 4 << 20
"""The longest packet that the server takes in these drills."""
Broken = Callable[[Config, Job, device.Pass, Site], Update]


def spoil(change: Callable[[Kind, bytes], tuple[Kind, bytes]], number: int = 3) -> Broken:
    """A device whose packet `number` is another one."""

    def work(config: Config, job: Job, given: device.Pass, site: Site) -> Update:
        class Spoiler(device.RemoteBody):
            sent = 0

            def _send(self, kind: Kind, noise: int, payload: bytes) -> tuple[int, bytes]:
                self.sent += 1
                if self.sent == number:
                    kind, payload = change(kind, payload)
                return self.stream.exchange(kind, noise, payload)

        return device.work(config, job, given, site, Spoiler)

    return work


def renumbered(by: int) -> Broken:
    """A device that sends its third packet under another number."""

    def work(config: Config, job: Job, given: device.Pass, site: Site) -> Update:
        class Spoiler(device.RemoteBody):
            sent = 0

            def _send(self, kind: Kind, noise: int, payload: bytes) -> tuple[int, bytes]:
                self.sent += 1
                if self.sent == 3:
                    self.stream._sequence += by
                return self.stream.exchange(kind, noise, payload)

        return device.work(config, job, given, site, Spoiler)

    return work


replayed, skipping = renumbered(-1), renumbered(1)


def die(config: Config, job: Job, given: device.Pass, site: Site) -> Update:
    """It dies in the middle of a step: its session stays open until the server sees it."""

    def gone(kind: Kind, payload: bytes) -> tuple[Kind, bytes]:
        raise KeyboardInterrupt

    try:
        return spoil(gone)(config, job, given, site)
    except KeyboardInterrupt:
        raise RuntimeError("died in mid-step") from None


def stolen(config: Config, job: Job, given: device.Pass, site: Site) -> Update:
    """Another node has the token."""
    return device.work(config, job, given, replace(site, state=site.state.with_name("thief")))


def guessed(config: Config, job: Job, given: device.Pass, site: Site) -> Update:
    """It has no token."""
    return device.work(config, job, replace(given, token=bytes(32)), site)


def distrusts(config: Config, job: Job, given: device.Pass, site: Site) -> Update:
    """It trusts another authority than the server's."""
    other = site.state.with_name("other-keys")
    certify(other, ["localhost"], 0)
    return device.work(config, job, given, replace(site, root_certificates=other / "ca.crt"))


def downgraded(config: Config, job: Job, given: device.Pass, site: Site) -> Update:
    """Somebody wants it to speak without TLS."""
    return device.work(config, job, replace(given, plaintext=True), site)


def silent(config: Config, job: Job, given: device.Pass, site: Site) -> Update:
    """It says that it is done, and never spoke with the body."""
    good = Loop(config)
    [update] = good.run([job])
    assert isinstance(update, Update)
    return replace(update, memory=b"", server=b"", notes=b"")


def poisoned(config: Config, job: Job, given: device.Pass, site: Site) -> Update:
    """Its steps are sound, its update is not."""
    update = device.work(config, job, given, site)
    return replace(update, up=update.up[:-4] + b"\x00\x00\xc0\x7f")


def hoarding(config: Config, job: Job, given: device.Pass, site: Site) -> Update:
    """It has the server keep what it likes, in the place of a receipt."""
    return replace(device.work(config, job, given, site), memory=pack({"x": torch.zeros(100_000)}))


def full(config: Config, job: Job, given: device.Pass, site: Site) -> Update:
    """The disk takes nothing any more."""
    before = drawer.durable

    def refuse(file: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    drawer.durable = refuse
    try:
        return device.work(config, job, given, site)
    finally:
        drawer.durable = before


def _sends(**named: torch.Tensor) -> Broken:
    return spoil(lambda kind, payload: (kind, pack(named)))


WORKS: dict[str, Broken] = {
    "dies in mid-step": die,
    "NaN on the wire": _sends(x=torch.full((8, 65, 48), torch.nan, dtype=torch.float16)),
    "wrong shape": _sends(x=torch.zeros(8, 48)),
    "wrong width": _sends(x=torch.zeros(8, 65, 40)),
    "truncated frame": spoil(lambda kind, payload: (kind, payload[:-7])),
    "no frame": spoil(lambda kind, payload: (kind, b"\x00" * 100)),
    "nothing": spoil(lambda kind, payload: (kind, b"")),
    "too long": spoil(lambda kind, payload: (kind, bytes(MOST_BYTES + 1))),
    "out of turn": spoil(lambda kind, payload: (Kind.BACKWARD, payload)),
    "kind of another shape": spoil(lambda kind, payload: (Kind.LEARN, payload)),
    "replayed": replayed,
    "out of order": skipping,
    "token of another node": stolen,
    "guessed token": guessed,
    "wrong certificate": distrusts,
    "no TLS": downgraded,
    "no session": silent,
    "spoilt update": poisoned,
    "no receipt": hoarding,
    "full disk": full,
}
