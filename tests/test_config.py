"""Keys from files and pairs, and back into TOML."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.config import keys, load, load_as, read_toml, resolve, to_toml, toml_scalar
from fedsplit.pretrain import Pretrain
from fedsplit.share.fedprox import FedProx
from fedsplit.types import FedsplitError


def test_later_values_win(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('seed = 1\nrounds = 7\n[optimizer]\nlr = 1\n[data]\n"local-test" = 0.5\n')
    (tmp_path / "b.toml").write_text("seed = 2\n")
    config = load([tmp_path / "a.toml", tmp_path / "b.toml"], ["rounds=9", "name='x y'", "eval.per-client=TRUE"])
    assert (config.seed, config.rounds, config.optimizer.lr, config.data.local_test) == (2, 9, 1.0, 0.5)
    assert config.name == "x y" and config.eval.per_client is True and type(config.optimizer.lr) is float


def test_the_typed_sections_and_the_values_are_one() -> None:
    config = resolve({"devices.per-round": 3, "share.fedprox.mu": 0.5, "share.proximal": "fedprox"})
    assert config.devices.per_round == config.values["devices.per-round"] == 3
    assert config.pieces("share.proximal") == [FedProx(mu=0.5)]
    assert config.names("share.proximal") == ("fedprox",) and config.pieces("body.edits") == []
    changed = config.replace(devices__per_round=4, seed=5)
    assert (changed.devices.per_round, changed.seed, config.seed) == (4, 5, 0)
    assert changed.piece("share.merge").__class__.__name__ == "FedAvg"


@given(st.text(max_size=30), st.integers(0, 2**40), st.floats(0, 1e30, allow_nan=False), st.booleans())
def test_toml_gives_back_every_scalar(text: str, whole: int, number: float, flag: bool) -> None:
    for value in (text, whole, number, flag):
        document = f"x = {toml_scalar(value)}"
        assert tomllib.loads(document)["x"] == value


def test_all_keys_survive_a_file(tmp_path: Path) -> None:
    values = {key.name: key.default for key in keys().values()} | {"name": 'quoted "name"', "seed": 3}
    (tmp_path / "all.toml").write_text(to_toml(values))
    assert read_toml(tmp_path / "all.toml") == values
    assert load([tmp_path / "all.toml"]).values == values


def test_other_dataclasses_of_knobs_load_the_same_way(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text("epochs = 2\n")
    found = load_as(Pretrain, [tmp_path / "p.toml"], ["lr=0.5"])
    assert (found.epochs, found.lr) == (2, 0.5)
    with pytest.raises(FedsplitError, match="Unknown config key 'rounds'"):
        load_as(Pretrain, [], ["rounds=1"])
