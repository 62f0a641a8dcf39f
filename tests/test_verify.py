"""`fedsplit verify`: two runs, and the first place in which they differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsplit import experiment
from fedsplit.cli.main import main
from fedsplit.config import resolve
from fedsplit.proof import compare
from fedsplit.runtime.inprocess import Loop
from fedsplit.types import FedsplitError, Scalar

VALUES: dict[str, Scalar] = {
    "model.name": "fedsplit_nano",
    "model.pretrained": False,
    "cut.front": 1,
    "rounds": 2,
    "data.limit": 40,
    "data.test-limit": 10,
    "data.partition": "iid",
    "devices.count": 2,
    "local.batch-size": 8,
    "share.quorum": 0.5,
}


def made(out: Path, **changes: Scalar) -> Path:
    config = resolve({**VALUES, **{name.replace("__", "."): value for name, value in changes.items()}, "out": str(out)})
    return experiment.run(config, Loop(config))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("verify") / "run")


def test_the_same_run_again(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = made(tmp_path / "again", name="other")
    assert compare(run, again) == {"agree": True, "rounds": 2, "differences": []}
    assert main(["verify", str(run), str(again)]) == 0
    assert "2 rounds" in capsys.readouterr().out


def test_a_run_that_was_stopped_and_went_on(run: Path, tmp_path: Path) -> None:
    made(tmp_path / "part", rounds=1)
    assert compare(run, tmp_path / "part")["differences"] == [
        "config: rounds is 2 in one and 1 in the other",
        "one has 2 rounds, the other 1",
    ]
    config = resolve({**VALUES, "resume": str(tmp_path / "part")})
    assert compare(run, experiment.run(config, Loop(config)))["agree"]


def test_a_client_that_failed_in_round_2(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = made(tmp_path / "other", engine__faults="raise:1@2")
    assert main(["verify", str(run), str(other), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["rounds"] == 1
    assert found["differences"] == ["round 2 is the first that differs, in: weights, ledger, clients"]


@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({"seed": 1}, ["config: seed", "the data differ", "the initial weights differ", "round 1 is the first"]),
        ({"data__limit": 41}, ["config: data.limit", "the data differ", "round 1 is the first"]),
        ({"optimizer__lr": 0.002}, ["config: optimizer.lr", "round 1 is the first that differs, in: weights"]),
    ],
)
def test_other_runs(changes: dict[str, Scalar], wanted: list[str], run: Path, tmp_path: Path) -> None:
    found = compare(run, made(tmp_path / "other", **changes))["differences"]
    assert len(found) == len(wanted)
    assert all(text.startswith(begin) for text, begin in zip(found, wanted, strict=True)), found


def alter(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (alter("proof.csv", "\n1,", "\n3,"), "was changed after round 3"),
        (lambda run: (run / "proof.csv").unlink(), "an earlier fedsplit made it"),
        (alter("summary.json", '"weights_sha256": "', '"weights_sha256": "0'), "is not what its summary.json names"),
        (lambda run: (run / "model.safetensors").write_bytes(b"dust"), "no sound model"),
        (lambda run: (run / "config.toml").unlink(), "is not a run folder"),
    ],
)
def test_what_proves_nothing_is_refused(change: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    broken = made(tmp_path / "broken", rounds=1)
    change(broken)
    with pytest.raises(FedsplitError, match=message):
        compare(broken, broken)


def test_a_run_without_a_proof_goes_on_without_one(tmp_path: Path) -> None:
    """An earlier version began it."""
    part = made(tmp_path / "part", rounds=1)
    (part / "proof.csv").unlink()
    config = resolve({**VALUES, "resume": str(part)})
    assert not (experiment.run(config, Loop(config)) / "proof.csv").exists()
