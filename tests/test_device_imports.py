"""What a device installs is enough: its round runs where the other extras' packages are absent."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

# Import names of what `fedsplit[device]` does not bring.
ABSENT = (
    *("datasets", "flwr_datasets", "matplotlib", "ortools", "pandas", "peft", "psutil", "ray", "scipy"),
    *("seaborn", "sklearn", "torchmetrics"),
)
MODULES = ("client", "client_app", "cli.main", "doctor.device", "runtime.flower_ray", "step", "wire.link", "world")
LATER = ("runtime.device", "runtime.half", "runtime.stream")

# What is refused looks as if it were not installed, to `import` and to `importlib.util.find_spec`.
REFUSED = """
import sys

class Finder:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent!r} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Finder, sys.meta_path)
"""
IMPORTS = f"""
import importlib, importlib.util
for name in {MODULES!r}:
    importlib.import_module("fedsplit." + name)
for name in {LATER!r}:
    if importlib.util.find_spec("fedsplit." + name):
        importlib.import_module("fedsplit." + name)
"""
ROUND = """
from dataclasses import replace
import numpy as np
from fedsplit import world as worlds
from fedsplit.client import client_round
from fedsplit.config import load
from fedsplit.experiment import start
from fedsplit.types import DataSet, Images, Job
from fedsplit.wire.frame import pack, unpack

images = Images(np.zeros((8, 32, 32, 3), np.uint8), np.arange(8) % 2)
worlds.load = lambda *_: DataSet("own", images, images, ("a", "b"))
worlds.deal = lambda *_: [np.arange(8)]
world = worlds.world(load(pairs=["devices.count=1", "local.max-steps=1", "local.batch-size=4"]))
model = start(world).model
frames = (pack({name: model[name] for name in side}) for side in (world.client, world.server))
update = client_round(world, Job(0, 1, 0, *frames))
assert update.report.steps == 1 and unpack(update.up).keys() == world.client.keys()
print("a round")
"""
PARQUET = """
import io, sys
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
from PIL import Image
from fedsplit.config import load
from fedsplit.data.sources import load as read
folder, blob = Path(sys.argv[1]), io.BytesIO()
Image.new("RGB", (8, 8)).save(blob, "PNG")
rows = [{"bytes": blob.getvalue()}] * 4
for name in ("train", "test"):
    pq.write_table(pa.table({"image": rows, "label": [0, 1, 0, 1]}), folder / f"{name}.parquet")
found = read(load(pairs=[f"data.source={folder}", f"data.cache={folder}/cache"]).data, 32)
assert found.train.pixels.shape == (4, 32, 32, 3)
print("a folder")
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_a_device_does_its_round_and_reads_its_data_without_the_other_extras(tmp_path: Path) -> None:
    done = run(REFUSED.format(absent=ABSENT) + IMPORTS + ROUND + PARQUET, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["a round", "a folder"]


def test_the_device_brings_nothing_of_a_simulation(repository: Path) -> None:
    parser = configparser.ConfigParser()
    parser.read(repository / "setup.cfg", encoding="utf-8")
    extras = parser["options.extras_require"]
    assert {"device", "simulation", "audit", "notebooks", "dev"} <= set(extras)
    asked = {one.name: one for one in map(Requirement, extras["device"].split("\n")[1:])}
    assert {"cryptography", "flwr", "grpcio", "pyarrow"} == set(asked) and not asked["flwr"].extras
    assert {one.name for one in map(Requirement, extras["simulation"].split("\n")[1:])} >= {"pyarrow", "flwr-datasets"}
