"""Invariants 6 and 7: in process, in a process pool and under `flwr run` the weights and the ledger are the same."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from alike import ROOT, VALUES, digest, in_process

from fedsplit import experiment
from fedsplit.config import resolve, to_toml
from fedsplit.progress import Silent
from fedsplit.runtime import superlink
from fedsplit.runtime.inprocess import Loop, Pool
from fedsplit.runtime.processes import no_process_left
from fedsplit.runtime.superlink import flwr_run


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
