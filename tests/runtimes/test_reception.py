"""Invariant 7 for the stream: devices that have their halves alone, at a served body, are as one process."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from alike import BODY, NANO, ROOT, assert_alike, in_process
from PIL import Image

sys.path.append(str(ROOT / "simulations"))

from drills.streamed import devices, streamed

from fedsplit import experiment
from fedsplit.config import Config, resolve
from fedsplit.front.cache import FrontCache
from fedsplit.runtime import device, kept
from fedsplit.runtime.site import Site
from fedsplit.types import Job, Scalar, Update
from fedsplit.world import world

REMEMBER: dict[str, Scalar] = {**BODY, "eval.per-client": False, "cut.tail": 0}
CONFIGS: dict[str, dict[str, Scalar]] = {
    "u-shape": {},
    "vanilla": {"cut.shape": "vanilla", "cut.tail": 0},
    "the tail alone": {"train": "tail", "cut.tail": 0},
    "alone": {"cut.shape": "none"},
    "in turns": {"server.schedule": "splitfed-v2", "server.optimizer": "keep"},
    "personal layers, plans, a bandit": REMEMBER,
    "prompts, a bottleneck and merging": {"front.edits": "prompts,bottleneck,merge", "train": "prompts,tail"},
    "chosen samples": {"local.phases": "self-update", "data.select": "el2n", "data.el2n.keep": 0.5},
    "codecs that remember": {"wire.parameters-up": "delta,feedback,topk", "wire.activations-up": "int8,zstd"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_over_the_stream_is_as_in_process(name: str, tmp_path: Path) -> None:
    values = {**NANO, **CONFIGS[name]}
    in_process(resolve(values), tmp_path / "here")
    assert_alike([tmp_path / "here", streamed(values, tmp_path)])


def test_devices_with_pictures_of_their_own(tmp_path: Path) -> None:
    """What the server would have dealt to a device, in a train.parquet that only the device has."""
    config = resolve(NANO)
    in_process(config, tmp_path / "here")
    built = world(config)
    with devices(NANO, tmp_path) as fleet:
        fleet.own_data = True
        for client, shard in enumerate(built.shards):
            images = [{"bytes": _png(pixels)} for pixels in built.data.train.pixels[shard]]
            table = pa.table({"image": images, "label": built.data.train.labels[shard]})
            (tmp_path / f"data-{client}").mkdir()
            pq.write_table(table, tmp_path / f"data-{client}" / "train.parquet")
        assert_alike([tmp_path / "here", experiment.run(fleet.config, fleet)])


def test_a_devices_front_outputs_stay_on_its_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every message has a process of its own, which finds what an earlier one computed, but for a damaged row."""
    values = {**NANO, "train": "tail", "cut.tail": 0, "model.dropout": 0.0, "rounds": 3}
    in_process(resolve(values), tmp_path / "here")
    found: dict[int, list[int]] = {0: [], 1: []}
    load = kept.load

    def noted(cache: FrontCache, file: Path) -> int:
        found[int(file.parent.name)].append(count := load(cache, file))
        return count

    def spoil(config: Config, job: Job, given: device.Pass, site: Site) -> Update:
        [file] = (site.state / "outputs").rglob("*.npy")
        content = bytearray(file.read_bytes())
        content[-1] ^= 255
        file.write_bytes(content)
        return device.work(config, job, given, site)

    monkeypatch.setattr(kept, "load", noted)
    with devices(values, tmp_path) as fleet:
        fleet.works[1, 3] = spoil
        assert_alike([tmp_path / "here", experiment.run(fleet.config, fleet)])
    sizes = [len(shard) for shard in world(resolve(values)).shards]
    assert found == {0: [0, sizes[0], sizes[0]], 1: [0, sizes[1], sizes[1] - 1]}


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
