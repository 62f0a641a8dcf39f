"""What a broken or hostile device does to a run over the stream: it is left out of its round, and nothing else.

Each fault ends as a run in which that client was never there, to the bit.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from alike import ROOT, digest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

sys.path.append(str(ROOT / "simulations"))

import faults
from drills import broken
from drills.broken import BROKEN, TINY
from drills.cutter import Cutter
from drills.streamed import devices, streamed

from fedsplit import experiment
from fedsplit.config import Config
from fedsplit.progress import Silent
from fedsplit.runtime import device
from fedsplit.runtime.site import Site
from fedsplit.types import FedsplitError, Job, Update

LISTED = tomllib.loads((ROOT / "simulations" / "faults.toml").read_text())["stream"]
HONEST: faults.Honest = {}


@pytest.mark.parametrize("name", broken.WORKS)
def test_a_broken_device_is_left_out(name: str, tmp_path: Path) -> None:
    """Every fault of faults.toml that a device can have, as the study runs it."""
    assert faults.streamed(name, LISTED[name], tmp_path, HONEST) == ""


def test_an_honest_device_is_not_taken_for_a_broken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The study can find fault."""
    monkeypatch.setitem(broken.WORKS, "honest", device.work)
    assert "does not say" in faults.streamed("honest", "refused", tmp_path, HONEST)


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
    def lost(config: Config, job: Job, given: device.Pass, site: Site) -> Update:
        for file in (site.state / "clients").rglob("*.safetensors"):
            file.write_bytes(b"dust")
        return device.work(config, job, given, site)

    with devices(TINY, tmp_path) as fleet:
        fleet.works[BROKEN, 2] = lost
        run = experiment.run(fleet.config, fleet)
    assert "missing or damaged" in (run / "clients.csv").read_text()


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
        Site.read(config)
