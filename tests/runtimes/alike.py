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
    "rounds": 3,  # whoever comes again has something to remember
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

# The same over the smallest model: for what does not depend on depth.
NANO: dict[str, Scalar] = {
    **VALUES,
    "model.name": "fedsplit_nano",
    "model.pretrained": False,
    "cut.front": 1,
    "cut.tail": 1,
    "rounds": 2,
    "data.limit": 60,
    "data.test-limit": 20,
    "devices.count": 2,
    "devices.per-round": 2,
}


# Scores, chosen samples and personal layers at the clients, personal layers at the server, a bandit's choices.
BODY: dict[str, Scalar] = {
    "cut.front": 1,
    "front.edits": "prompts",
    "local.phases": "self-update",
    "local.head": "auxiliary",
    "local.self-update.epochs": 1,
    "data.select": "el2n",
    "data.el2n.once": True,
    "body.plans": "knapsack,layerdrop",
    "body.knapsack.refresh": 2,
    "share.partial": "ptls",
    "share.ptls.by": "gradient",
    "control.tune": "bandit",
    "control.bandit.rates": "0.2,0.5",
    "data.local-test": 0.2,
    "eval.per-client": True,
    "devices.flops-per-s": 1e9,
    "devices.server-flops-per-s": 1e9,
}


def digest(folder: Path) -> tuple[str, str]:
    """The weights and the ledger of a finished run."""
    summary = json.loads((folder / "summary.json").read_text())
    return summary["weights_sha256"], summary["ledger_sha256"]


def in_process(config: Config, folder: Path) -> tuple[str, str]:
    """The digests of a run of `config`, one client after another in this process."""
    config = config.replace(out=str(folder))
    return digest(experiment.run(config, Loop(config)))


def assert_alike(folders: list[Path]) -> None:
    """Finished runs with the same weights, ledger and figures, and the same choices of their controllers, if any."""
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    for name in ("weights_sha256", "ledger_sha256", "client_flops", "server_flops", "kept_samples", "virtual_s"):
        assert len({summary[name] for summary in summaries}) == 1, name
    choices = [file.read_text() if (file := folder / "choices.csv").exists() else "" for folder in folders]
    assert len(set(choices)) == 1
