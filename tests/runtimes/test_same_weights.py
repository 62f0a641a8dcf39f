"""Invariants 6 and 7: in process, in a process pool and under `flwr run` the weights and the ledger are the same."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedsplit import experiment
from fedsplit.config import Config, read_toml, resolve, to_toml
from fedsplit.progress import Silent
from fedsplit.runtime import superlink
from fedsplit.runtime.inprocess import Loop, Pool
from fedsplit.runtime.processes import no_process_left
from fedsplit.runtime.superlink import flwr_run
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
    summary = json.loads((folder / "summary.json").read_text())
    return summary["weights_sha256"], summary["ledger_sha256"]


def in_process(config: Config, folder: Path) -> tuple[str, str]:
    config = config.replace(out=str(folder))
    return digest(experiment.run(config, Loop(config)))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return in_process(resolve(VALUES), tmp_path_factory.mktemp("reference") / "run")


def test_another_seed_is_another_model(reference: tuple[str, str], tmp_path: Path) -> None:
    assert in_process(resolve({**VALUES, "seed": 1}), tmp_path / "run")[0] != reference[0]


@pytest.mark.slow
def test_a_process_pool(reference: tuple[str, str], tmp_path: Path) -> None:
    config = resolve({**VALUES, "engine.workers": 2, "out": str(tmp_path / "run")})
    runner = Pool(config)
    try:
        assert digest(experiment.run(config, runner)) == reference
    finally:
        runner.close()


class Stop(Silent):
    """Ends a run after its first round, as a power cut would."""

    def row(self, row: Mapping[str, Any]) -> None:
        if row["round"] == 2:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_flower_run_that_goes_on_with_one_begun_in_process(tmp_path: Path) -> None:
    """SplitFed-V2: the server's one body and its optimiser pass from client to client, and over the break."""
    config = resolve({**VALUES, "server.schedule": "splitfed-v2", "cut.shape": "vanilla"})
    reference = in_process(config, tmp_path / "whole")
    config = config.replace(out=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        experiment.run(config, Loop(config), progress=Stop())
    assert not (tmp_path / "run" / "summary.json").exists()
    flwr_run(ROOT, {"resume": str(tmp_path / "run")}, nodes=2, cwd=tmp_path)
    assert digest(tmp_path / "run") == reference


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


@pytest.mark.slow
def test_plain_flwr_run_with_a_toml_file(reference: tuple[str, str], tmp_path: Path) -> None:
    """The command of the README, word by word, on ports and a Flower home of its own."""
    (tmp_path / "study.toml").write_text(to_toml({**VALUES, "out": str(tmp_path / "run")}))
    with superlink._private_home() as home, no_process_left() as mark:
        env = superlink._environment(home, mark, {})
        ports = ("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "FLWR_LOCAL_CONTROL_API_PORT")
        env |= dict(zip(ports, map(str, superlink._free_ports(2)), strict=True))
        command = ["flwr", "run", ".", "--stream", "--run-config", str(tmp_path / "study.toml")]
        command += ["--federation-config", "num-supernodes=4 client-resources-num-cpus=1"]
        command[0] = superlink._tool("flwr")
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert (tmp_path / "run" / "summary.json").exists(), done.stdout[-3000:] + done.stderr[-1000:]
    assert digest(tmp_path / "run") == reference
    assert "round   2" in done.stdout, "progress shows in the stream"
