"""What a broken or hostile device does to a run over the stream: it is left out of its round, and nothing else.

Each fault ends as a run in which that client was never there, to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alike import VALUES, digest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cutter import Cutter
from streamed import devices, streamed

from fedsplit import experiment
from fedsplit.config import Config, resolve
from fedsplit.deploy.certificates import certify
from fedsplit.progress import Silent
from fedsplit.runs import RunFolder
from fedsplit.runtime import device
from fedsplit.runtime.inprocess import Loop
from fedsplit.runtime.stream.packet import Kind
from fedsplit.types import Failure, FedsplitError, Job, Scalar, Update
from fedsplit.wire.frame import pack

BROKEN, ROUND = 1, 1
TINY: dict[str, Scalar] = {
    **VALUES,
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

Broken = Callable[[Config, Job, device.Pass, device.Site], Update]


class Without(Loop):
    """A fleet in which the broken client was not there in its round."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Update | Failure]:
        return super().run([job for job in jobs if (job.client, job.round) != (BROKEN, ROUND)])


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights without the broken client."""
    config = resolve({**TINY, "out": str(tmp_path_factory.mktemp("honest") / "run")})
    return digest(experiment.run(config, Without(config)))[0]


def spoil(change: Callable[[Kind, bytes], tuple[Kind, bytes]], number: int = 3) -> Broken:
    """A device whose packet `number` is another one."""

    def work(config: Config, job: Job, given: device.Pass, site: device.Site) -> Update:
        class Spoiler(device.RemoteBody):
            sent = 0

            def _send(self, kind: Kind, noise: int, payload: bytes) -> tuple[int, bytes]:
                self.sent += 1
                if self.sent == number:
                    kind, payload = change(kind, payload)
                return self.stream.exchange(kind, noise, payload)

        return device.work(config, job, given, site, Spoiler)

    return work


def tensors(**named: torch.Tensor) -> bytes:
    return pack(named)


def die(config: Config, job: Job, given: device.Pass, site: device.Site) -> Update:
    def gone(kind: Kind, payload: bytes) -> tuple[Kind, bytes]:
        raise KeyboardInterrupt

    try:
        return spoil(gone)(config, job, given, site)
    except KeyboardInterrupt:
        raise RuntimeError("died in mid-step") from None


def stolen(config: Config, job: Job, given: device.Pass, site: device.Site) -> Update:
    """Another node has the token."""
    return device.work(config, job, given, replace(site, state=site.state.with_name("thief")))


def guessed(config: Config, job: Job, given: device.Pass, site: device.Site) -> Update:
    return device.work(config, job, replace(given, token=bytes(32)), site)


def distrusts(config: Config, job: Job, given: device.Pass, site: device.Site) -> Update:
    other = site.state.with_name("other-keys")
    certify(other, ["localhost"], 0)
    return device.work(config, job, given, replace(site, root_certificates=other / "ca.crt"))


def downgraded(config: Config, job: Job, given: device.Pass, site: device.Site) -> Update:
    return device.work(config, job, replace(given, plaintext=True), site)


def silent(config: Config, job: Job, given: device.Pass, site: device.Site) -> Update:
    """It says that it is done, and never spoke with the body."""
    good = Loop(config)
    [update] = good.run([job])
    assert isinstance(update, Update)
    return replace(update, memory=b"", server=b"", notes=b"")


def poisoned(config: Config, job: Job, given: device.Pass, site: device.Site) -> Update:
    """Its steps are sound, its update is not."""
    update = device.work(config, job, given, site)
    return replace(update, up=update.up[:-4] + b"\x00\x00\xc0\x7f")


FAULTS: dict[str, tuple[Broken, str]] = {
    "dies in mid-step": (die, "died in mid-step"),
    "NaN on the wire": (
        spoil(lambda kind, payload: (kind, tensors(x=torch.full((8, 65, 48), torch.nan, dtype=torch.float16)))),
        "not finite",
    ),
    "wrong shape": (spoil(lambda kind, payload: (kind, tensors(x=torch.zeros(8, 48)))), "not tokens"),
    "wrong width": (spoil(lambda kind, payload: (kind, tensors(x=torch.zeros(8, 65, 40)))), "does not fit the body"),
    "truncated frame": (spoil(lambda kind, payload: (kind, payload[:-7])), "not a frame"),
    "no frame": (spoil(lambda kind, payload: (kind, b"\x00" * 100)), "not a frame"),
    "nothing": (spoil(lambda kind, payload: (kind, b"")), "not tokens"),
    "too long": (spoil(lambda kind, payload: (kind, bytes(5 << 20))), "more than the limit"),
    "out of turn": (spoil(lambda kind, payload: (Kind.BACKWARD, payload)), "out of turn"),
    "another shape's kind": (spoil(lambda kind, payload: (Kind.LEARN, payload)), "out of turn"),
    "another node's token": (stolen, "refused"),
    "a guessed token": (guessed, "refused"),
    "a wrong certificate": (distrusts, "not trusted"),
    "no TLS": (downgraded, "without TLS"),
    "no session": (silent, "did not end well"),
    "a spoilt update": (poisoned, "cannot be decoded"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_device_is_left_out(name: str, tmp_path: Path, honest: str) -> None:
    work, reason = FAULTS[name]
    with devices(TINY, tmp_path, packet_bytes=4 << 20) as fleet:
        fleet.works[BROKEN, ROUND] = work
        run = experiment.run(fleet.config, fleet)
        assert not fleet.reception.server.sessions() or all(
            one.state in ("done", "gone") for one in fleet.reception.server.sessions()
        )
    assert digest(run)[0] == honest
    summary = json.loads((run / "summary.json").read_text())
    failed = [row["failure"] for row in RunFolder(run).rows("clients") if reason in row["failure"]]
    assert summary["failures"] == 1 and len(failed) == 1, (run / "clients.csv").read_text()


def test_a_network_that_breaks_changes_nothing(tmp_path: Path) -> None:
    """Cut within a packet up, between packets, and again: every session goes on where it was."""
    whole = digest(streamed(TINY, tmp_path / "whole"))
    with devices(TINY, tmp_path / "cut", patience_s=30.0) as fleet:
        cutter = Cutter(fleet.reception.address, [9_000, 20_000, 60_000, 61_000, 130_000, 5_000, 90_000])
        fleet.reception.address = cutter.address
        try:
            assert digest(experiment.run(fleet.config, fleet)) == whole
        finally:
            cutter.close()
    assert cutter.cuts >= 5


class Stop(Silent):
    """Ends a run in the middle of round 2, after its clients have written theirs down."""

    def row(self, row: Any) -> None:
        if row["round"] == 2:
            raise KeyboardInterrupt


def test_devices_go_on_from_the_round_that_the_server_counted(tmp_path: Path) -> None:
    """The server dies before its checkpoint of round 2: the devices are ahead, and their older files count."""
    values = {**TINY, "rounds": 3}
    whole = digest(streamed(values, tmp_path / "whole"))
    with devices(values, tmp_path / "run") as fleet, pytest.raises(KeyboardInterrupt):
        experiment.run(fleet.config, fleet, progress=Stop())
    with devices(values, tmp_path / "run", nodes=0) as fleet:
        resumed = fleet.config.replace(resume=str(tmp_path / "run" / "run"))
        assert digest(experiment.run(resumed, fleet)) == whole


def test_a_device_that_lost_what_it_kept_says_so(tmp_path: Path) -> None:
    def lost(config: Config, job: Job, given: device.Pass, site: device.Site) -> Update:
        for file in (site.state / "clients").rglob("*.safetensors"):
            file.write_bytes(b"dust")
        return device.work(config, job, given, site)

    with devices(TINY, tmp_path) as fleet:
        fleet.works[BROKEN, 2] = lost
        run = experiment.run(fleet.config, fleet)
    assert "missing or damaged" in (run / "clients.csv").read_text()


def test_a_full_disk_is_a_failed_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, honest: str) -> None:
    def full(config: Config, job: Job, given: device.Pass, site: device.Site) -> Update:
        def refuse(file: Path, content: bytes) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("fedsplit.runtime.drawer.durable", refuse)
            return device.work(config, job, given, site)

    with devices(TINY, tmp_path) as fleet:
        fleet.works[BROKEN, ROUND] = full
        run = experiment.run(fleet.config, fleet)
    assert digest(run)[0] == honest and "No space left on device" in (run / "clients.csv").read_text()


def test_other_frozen_weights_are_refused(tmp_path: Path) -> None:
    """A device with the half of another model would train against the wrong body."""
    with devices({**TINY, "train": "tail"}, tmp_path / "one") as fleet:
        site = fleet.site(0)
        with devices({**TINY, "train": "tail", "seed": 1}, tmp_path / "two") as other:
            job, given = other.reception.invite(
                Job(0, 1, 0, b"", b""), 0, Ed25519PrivateKey.generate().public_key().public_bytes_raw(), 60.0
            )
            with pytest.raises(FedsplitError, match="frozen weights are not the server's"):
                device.work(fleet.config, job, given, site)


def test_a_client_of_another_device_is_refused(tmp_path: Path) -> None:
    with devices(TINY, tmp_path) as fleet:
        given = device.Pass("", b"", False, "")
        with pytest.raises(FedsplitError, match="not of this device"):
            device.work(fleet.config, Job(2, 1, 0, b"", b""), given, fleet.site(0))


@pytest.mark.parametrize(
    "config, message",
    [
        ({}, "which device this is"),
        ({"partition-id": 2, "num-partitions": 2}, "which device this is"),
        ({"partition-id": "0", "num-partitions": 2}, "which device this is"),
        ({"partition-id": 0, "num-partitions": 2, "hlaf": "x"}, "'hlaf'"),
    ],
)
def test_a_node_config_that_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(FedsplitError, match=message):
        device.Site.read(config)
