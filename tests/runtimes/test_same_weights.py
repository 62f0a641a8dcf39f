"""Invariants 6 and 7: in process, in a pool and under `flwr run` the weights and the ledger are the same."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from alike import BODY, NANO, ROOT, VALUES, assert_alike, digest, in_process

from fedsplit import experiment
from fedsplit.config import Config, resolve, to_toml
from fedsplit.progress import Silent
from fedsplit.runtime import superlink
from fedsplit.runtime.inprocess import Loop, Pool
from fedsplit.runtime.processes import no_process_left
from fedsplit.runtime.superlink import flwr_run


def test_another_seed_is_another_model(tmp_path: Path) -> None:
    one, other = (in_process(resolve({**NANO, "seed": seed}), tmp_path / str(seed)) for seed in (0, 1))
    assert one[0] != other[0]


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
    lines: list[str] = []
    done = flwr_run(ROOT, {"resume": str(tmp_path / "run")}, nodes=2, ray_cpus=1, cwd=tmp_path, echo=lines.append)
    assert "\n".join(lines) == done.log and "round   3" in done.log
    assert digest(tmp_path / "run") == reference


@pytest.mark.slow
def test_plain_flwr_run_with_a_toml_file(tmp_path: Path) -> None:
    """The command of the README, word by word, on ports and a Flower home of its own; clients remember and plan."""
    values = {**VALUES, **BODY}
    in_process(resolve(values), tmp_path / "here")
    in_a_pool(resolve(values), tmp_path / "pool")
    (tmp_path / "study.toml").write_text(to_toml({**values, "out": str(tmp_path / "run"), "track": "tensorboard"}))
    with superlink.private_home() as home, no_process_left() as mark:
        env = superlink.environment(home, mark, {})
        ports = ("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "FLWR_LOCAL_CONTROL_API_PORT")
        env |= dict(zip(ports, map(str, superlink.free_ports(2)), strict=True))
        command = ["flwr", "run", ".", "--stream", "--run-config", str(tmp_path / "study.toml")]
        command += ["--federation-config", "num-supernodes=4 client-resources-num-cpus=1"]
        command[0] = superlink.tool("flwr")
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert (tmp_path / "run" / "summary.json").exists(), done.stdout[-3000:] + done.stderr[-1000:]
    assert_alike([tmp_path / "here", tmp_path / "pool", tmp_path / "run"])
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1, "the tracker is of no influence"
    assert "round   2" in done.stdout, "progress shows in the stream"


def in_a_pool(config: Config, folder: Path) -> None:
    config = config.replace(out=str(folder), engine__workers=2)
    pool = Pool(config)
    try:
        experiment.run(config, pool)
    finally:
        pool.close()
