"""Invariant 7 for clients that remember: scores, personal layers and choices are the same in every runtime.

A file of its own, beside test_same_weights.py, so that two workers share the runs under Flower.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from alike import BODY, ROOT, VALUES, assert_alike, in_process

from fedsplit import experiment
from fedsplit.config import Config, read_toml, resolve
from fedsplit.runtime.inprocess import Pool
from fedsplit.runtime.superlink import flwr_run
from fedsplit.types import Scalar

SFPROMPT: dict[str, Scalar] = {
    **read_toml(ROOT / "configs/papers/sfprompt.toml"),
    "local.self-update.epochs": 2,
    "data.el2n.once": True,
    # As any run may have them; with the rest of VALUES.
    "model.dropout": 0.1,
    "wire.activations-up": "half",
}


@pytest.mark.slow
def test_what_clients_remember_travels_with_them(tmp_path: Path) -> None:
    """Loop, pool and Flower give the same weights, ledger and FLOPs."""
    values = {**VALUES, **SFPROMPT}
    folders = {name: tmp_path / name for name in ("loop", "pool", "flower")}
    in_process(resolve(values), folders["loop"])
    in_a_pool(resolve(values), folders["pool"])
    lines: list[str] = []
    done = flwr_run(ROOT, {**values, "out": str(folders["flower"])}, nodes=4, cwd=tmp_path, echo=lines.append)
    assert "\n".join(lines) == done.log and "round   3" in done.log
    assert_alike(list(folders.values()))


@pytest.mark.slow
def test_a_pool_and_personal_layers(tmp_path: Path) -> None:
    """What test_same_weights.py compares with `flwr run`, in a process pool."""
    config = resolve({**VALUES, **BODY})
    in_process(config, tmp_path / "loop")
    in_a_pool(config, tmp_path / "pool")
    assert_alike([tmp_path / "loop", tmp_path / "pool"])


def in_a_pool(config: Config, folder: Path) -> None:
    config = config.replace(out=str(folder), engine__workers=2)
    pool = Pool(config)
    try:
        experiment.run(config, pool)
    finally:
        pool.close()
