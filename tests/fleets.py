"""Small worlds of unequal devices, and their runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedsplit import experiment
from fedsplit.config import Config, resolve
from fedsplit.runs import RunFolder
from fedsplit.runtime.inprocess import Loop
from fedsplit.world import World, world

TINY: dict[str, Any] = {
    "data.limit": 60, "data.test-limit": 20, "data.partition": "iid", "data.allow-missing-classes": True,
    "devices.count": 6, "local.batch-size": 5, "rounds": 2, "eval.every": 9, "model.pretrained": False,
    "local.max-steps": 1, "local.epochs": 1, "model.name": "fedsplit_nano", "cut.front": 1,
}  # fmt: skip
FLEET: dict[str, Any] = {
    "devices.fleet": "pi4:3,orin-nano:2,phone:1", "devices.jitter": 0.3, "devices.server-flops-per-s": 1e8,
}  # fmt: skip


def built(**values: Any) -> World:
    """A world of six unequal devices."""
    return world(resolve({**TINY, **FLEET, **{name.replace("__", "."): value for name, value in values.items()}}))


def run(config: Config, out: Path) -> tuple[RunFolder, dict[str, Any]]:
    """A run and its summary."""
    path = experiment.run(config.replace(out=str(out)), Loop(config))
    return RunFolder(path), json.loads((path / "summary.json").read_text())
