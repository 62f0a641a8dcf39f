"""Trackers: what they are told, that nothing depends on them, and that a run that goes on says nothing twice."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent / "runtimes"))

from alike import NANO

from fedsplit import experiment
from fedsplit.cli.main import main
from fedsplit.config import Config, resolve
from fedsplit.progress import Silent
from fedsplit.proof import compare
from fedsplit.runtime.inprocess import Loop
from fedsplit.track import TRACKERS
from fedsplit.track.tensorboard import chosen
from fedsplit.types import FedsplitError, Scalar

STEERED: dict[str, Scalar] = {
    **NANO,
    "rounds": 3,
    "local.max-steps": 1,
    "cut.tail": 0,
    "body.plans": "layerdrop",
    "control.tune": "bandit",
    "control.bandit.rates": "0.2,0.5",
    "data.local-test": 0.2,
    "devices.flops-per-s": 1e9,
    "devices.server-flops-per-s": 1e9,
}


class Dies(Silent):
    """Ends a run when the rows of its second round are written, and its checkpoint is not."""

    def row(self, row: Mapping[str, Any]) -> None:
        if row["round"] == 2:
            raise KeyboardInterrupt


def run(config: Config, folder: Path) -> Path:
    config = config.replace(out=str(folder))
    return experiment.run(config, Loop(config))


def events(folder: Path) -> Any:
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()


def rows(folder: Path, table: str) -> list[dict[str, str]]:
    with (folder / f"{table}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody is told of."""
    return run(resolve(STEERED), tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with every tracker there is."""
    return run(resolve({**STEERED, "track": ",".join(TRACKERS)}), tmp_path_factory.mktemp("tracked") / "run")


def test_no_result_depends_on_it(plain: Path, tracked: Path) -> None:
    assert compare(plain, tracked) == {"agree": True, "rounds": 3, "differences": []}
    for table in ("ledger", "choices"):
        assert rows(plain, table) == rows(tracked, table)
    assert not (plain / "tensorboard").exists()


def test_scalars_are_those_of_the_tables(tracked: Path) -> None:
    found = events(tracked)

    def values(tag: str) -> dict[int, float]:
        return {event.step: event.value for event in found.Scalars(tag)}

    def column(table: str, name: str) -> dict[int, float]:
        return {int(row["round"]): pytest.approx(float(row[name]), rel=1e-6) for row in rows(tracked, table)}

    for tag in ("test/accuracy", "test/loss", "train/train_loss", "cost/virtual_s", "cost/energy_j", "bytes/bytes_up"):
        assert values(tag) == column("rounds", tag.rpartition("/")[2])
    assert values("cost/client_flops") == column("rounds", "client_flops")
    assert values("streams/activations_up") == column("ledger", "activations_up")
    rates = [row for row in rows(tracked, "choices") if row["group"] == "0"]
    assert values("control/bandit/rate/group 0") == {int(r["round"]): pytest.approx(float(r["rate"])) for r in rates}
    summary = json.loads((tracked / "summary.json").read_text())
    assert values("summary/bytes_up") == {3: pytest.approx(summary["bytes_up"], rel=1e-6)}
    assert "train/local_loss" not in found.Tags()["scalars"], "an empty cell is no number"


def test_the_keys_are_hyper_parameters(tracked: Path) -> None:
    from tensorboard.plugins.hparams import plugin_data_pb2

    found = events(tracked).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(found).session_start_info.hparams
    assert start["cut.front"].number_value == 1 and start["data.alpha"].number_value == 1.0
    assert start["control.tune"].string_value == "bandit" and not {"out", "track", "wire.topk.keep"} & set(start)
    assert "_hparams_/session_end_info" in events(tracked).summary_metadata


def test_a_run_that_goes_on_has_every_step_once(tmp_path: Path, plain: Path, tracked: Path) -> None:
    config = resolve({**STEERED, "track": "tensorboard", "out": str(tmp_path / "run")})
    with pytest.raises(KeyboardInterrupt):
        experiment.run(config, Loop(config), progress=Dies())
    assert [event.step for event in events(tmp_path / "run").Scalars("test/loss")] == [1, 2]
    assert main(["resume", str(tmp_path / "run"), "--quiet"]) == 0
    here, whole = events(tmp_path / "run"), events(tracked)
    assert here.Tags()["scalars"] == whole.Tags()["scalars"]
    for tag in here.Tags()["scalars"]:
        assert [event.step for event in here.Scalars(tag)] == [event.step for event in whole.Scalars(tag)], tag
    assert [e.value for e in here.Scalars("test/loss")] == [e.value for e in whole.Scalars("test/loss")]
    assert compare(plain, tmp_path / "run")["agree"]


def test_without_a_tracker_its_package_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    config = resolve({**NANO, "rounds": 1})
    assert (run(config, tmp_path / "off") / "summary.json").exists()
    with pytest.raises(ImportError):
        TRACKERS["tensorboard"]().open(config, tmp_path / "on", 0)


def test_a_missing_package_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracked: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    config = resolve({**NANO, "track": "tensorboard", "out": str(tmp_path / "run")})
    for start in (config, config.replace(resume=str(tracked))):
        with pytest.raises(FedsplitError, match=r"needs the package 'tensorboard': pip install 'fedsplit\[track\]'"):
            experiment.run(start, Loop(start))
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(FedsplitError, match="track names no piece 'tensorbord' .did you mean 'tensorboard'"):
        resolve({"track": "tensorbord"})


def test_choices_of_clients_are_a_mean() -> None:
    each = [{"controller": "c", "round": 1, "client": n, "keep": keep, "kind": "a"} for n, keep in ((0, 0.2), (1, 0.6))]
    assert dict(chosen(each)) == {"control/c/keep": pytest.approx(0.4)}
    assert dict(chosen([{**each[0], "keep": ""}])) == {}
