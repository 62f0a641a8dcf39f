"""One small run, and what says that another is the same to the bit."""

from __future__ import annotations

import json
from pathlib import Path

from fedsplit import experiment
from fedsplit.config import Config
from fedsplit.runtime.inprocess import Loop
from fedsplit.types import Scalar

ROOT = Path(__file__).resolve().parents[2]
VALUES: dict[str, Scalar] = {
    "rounds": 2,
    "data.limit": 150,
    "data.test-limit": 40,
    "data.alpha": 1.0,
    "devices.count": 4,
    "devices.per-round": 3,
    "local.batch-size": 16,
    "model.dropout": 0.1,
    "optimizer.name": "adamw",
    "optimizer.lr": 0.001,
    "wire.activations-up": "half",
}


def digest(folder: Path) -> tuple[str, str]:
    """The weights and the ledger of a finished run."""
    summary = json.loads((folder / "summary.json").read_text())
    return summary["weights_sha256"], summary["ledger_sha256"]


def in_process(config: Config, folder: Path) -> tuple[str, str]:
    """The digests of a run of `config`, one client after another in this process."""
    config = config.replace(out=str(folder))
    return digest(experiment.run(config, Loop(config)))
