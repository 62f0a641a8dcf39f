"""Invariant 7 for clients that remember: scores, personal layers and choices are the same in every runtime.

A file of its own, beside test_same_weights.py, so that two workers share the runs under Flower.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from alike import ROOT, VALUES

from fedsplit import experiment
from fedsplit.config import read_toml, resolve
from fedsplit.runtime.inprocess import Loop, Pool
from fedsplit.runtime.superlink import flwr_run
from fedsplit.types import Scalar

SFPROMPT: dict[str, Scalar] = {
    **read_toml(ROOT / "configs/papers/sfprompt.toml"),
    "local.self-update.epochs": 2,
    "data.el2n.once": True,
}
# Scores and personal layers at the clients, personal layers at the server, a bandit's choices.
BODY: dict[str, Scalar] = {
    "cut.front": 1,
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


@pytest.mark.slow
@pytest.mark.parametrize("method", [SFPROMPT, BODY], ids=["sfprompt", "body"])
def test_what_clients_remember_travels_with_them(method: dict[str, Scalar], tmp_path: Path) -> None:
    """Loop, pool and Flower give the same weights, ledger, FLOPs and choices."""
    shared = {name: VALUES[name] for name in VALUES if name.startswith(("data.", "devices."))}
    values = {**shared, **method, "rounds": 3}
    folders = {name: tmp_path / name for name in ("loop", "pool", "flower")}
    configs = {name: resolve({**values, "out": str(folder)}) for name, folder in folders.items()}
    experiment.run(configs["loop"], Loop(configs["loop"]))
    pool = Pool(configs["pool"].replace(engine__workers=2))
    try:
        experiment.run(configs["pool"], pool)
    finally:
        pool.close()
    flwr_run(ROOT, {**values, "out": str(folders["flower"])}, nodes=4, cwd=tmp_path)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders.values()]
    for name in ("weights_sha256", "ledger_sha256", "client_flops", "server_flops", "kept_samples", "virtual_s"):
        assert len({summary[name] for summary in summaries}) == 1, name
    choices = [(folder / "choices.csv").read_text() for folder in folders.values() if "control.tune" in method]
    assert len(set(choices)) == len(choices[:1])
