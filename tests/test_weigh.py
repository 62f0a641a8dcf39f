"""`fedsplit plan --choose`: what is preferred is taken as long as every kind of device can bear it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedsplit import experiment
from fedsplit.cli.choose import document
from fedsplit.cli.main import main
from fedsplit.config import Config, load, resolve
from fedsplit.control.by_kind import ByKind
from fedsplit.experiment import check
from fedsplit.plan import account
from fedsplit.runtime.inprocess import Loop
from fedsplit.types import FedsplitError, Scalar
from fedsplit.weigh import Search, settled
from fedsplit.world import world

BATCH = "local.batch-size"
SMALL: dict[str, Scalar] = {
    "model.name": "fedsplit_nano",
    "model.pretrained": False,
    "data.limit": 80,
    "data.test-limit": 20,
    "data.partition": "iid",
    "devices.count": 4,
    "devices.fleet": "pi4:2,orin-nano:2",
    "devices.server-flops-per-s": 1e12,
    "cut.front": 2,
    "rounds": 2,
}
TRIES: dict[str, list[Scalar]] = {"cut.front": [2, 1, 0], BATCH: [16, 8, 2]}


def config(**changes: Scalar) -> Config:
    return resolve(SMALL).replace(**changes)


def costs(measure: str, front: int, kind: str, batch: int = 16) -> float:
    search = Search(config(), {"cut.front": [front], BATCH: [batch]}, {})
    return next(try_.costs[measure] for try_ in search.best().weighed if try_.kind.startswith(kind))


def test_without_limits_what_is_preferred_is_chosen() -> None:
    chosen = Search(config(), TRIES, {}).best()
    assert chosen.shared == {"cut.front": 2} and [own[BATCH] for own in chosen.own.values()] == [16, 16]
    assert len(chosen.weighed) == 2, "nothing else had to be weighed"
    assert settled(config(), chosen) == config(cut__front=2, local__batch_size=16)


def test_a_limit_takes_blocks_away_from_all_and_samples_from_the_slow_alone() -> None:
    deep, shallow = costs("seconds", 2, "raspberry"), costs("seconds", 0, "raspberry")
    assert deep > shallow
    chosen = Search(config(), TRIES, {"seconds": shallow}).best()
    assert chosen.shared == {"cut.front": 0}
    memory = (costs("memory_bytes", 2, "raspberry", 2) + costs("memory_bytes", 2, "raspberry")) / 2
    chosen = Search(config(), {BATCH: [16, 8, 2]}, {"memory_bytes": memory}).best()
    assert {own[BATCH] for own in chosen.own.values()} <= {8, 2}
    assert any(try_.breaks == ("memory_bytes",) for try_ in chosen.weighed)


def test_kinds_that_differ_get_their_own_values_in_a_config_that_runs(tmp_path: Path) -> None:
    chosen = Search(config(), {BATCH: [16, 4]}, {}).best()
    mixed = type(chosen)(chosen.shared, dict(zip(chosen.own, ({BATCH: 16}, {BATCH: 4}), strict=True)), chosen.weighed)
    made = settled(config(), mixed)
    assert made.names("control.tune") == ("by-kind",)
    assert str(made.values["control.by-kind.give"]).count("local.batch-size=") == 2
    made = made.replace(out=str(tmp_path / "run"))
    folder = experiment.run(made, Loop(made))
    summary = json.loads((folder / "summary.json").read_text())
    planned = account(made)
    assert summary["bytes_up"] + summary["bytes_down"] == planned.total_bytes
    assert summary["virtual_s"] == pytest.approx(planned.virtual_s)
    rows = (folder / "choices.csv").read_text()
    assert "local.batch-size=4" in rows and "local.batch-size=16" in rows
    assert (folder / "choices.png").exists()


def test_nothing_within_the_limits_is_one_sentence() -> None:
    with pytest.raises(
        FedsplitError, match=r"Nothing that was tried is within the limits on .*a round takes .* joules"
    ):
        Search(config(), TRIES, {"joules": 1e-9}).best()
    with pytest.raises(FedsplitError, match="Nothing was left to weigh"):
        Search(config(), {"cut.front": []}, {}).best()


def test_the_command_writes_a_config_that_a_run_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [f"--set={key}={value}" for key, value in SMALL.items()]
    target = tmp_path / "chosen.toml"
    words = ["plan", "--choose", "--json", "--limit=front=1", "--try=cut.front=0|1", "--try=wire.activations-up=|half"]
    assert main([*words, f"--write={target}", *pairs]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["chosen"] == {"cut.front": 1} and found["written"] == str(target)
    assert [row["chosen"] for row in found["weighed"]] == [True, True]
    made = load([target])
    assert made.cut.front == 1
    check(made, world(made))
    assert main(["plan", "--choose", *pairs]) == 0
    assert "* is chosen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tries", "limits", "sentence"),
    [
        (["cut.frnt=1"], [], "--try cut.frnt=1: write KEY=VALUE"),
        (["cut.front=one"], [], "'one' is not int"),
        (["cut.front=-1"], [], "cut.front must be at least 0"),
        ([], ["speed=3"], "--limit speed=3: write NAME=NUMBER with one of seconds"),
        ([], ["seconds=soon"], "--limit seconds=soon"),
    ],
)
def test_malformed_entries_are_one_sentence(tries: list[str], limits: list[str], sentence: str) -> None:
    with pytest.raises(FedsplitError, match=sentence):
        document(config(), tries, limits, None)


def test_options_of_choosing_need_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--limit=seconds=3"]) == 2
    assert "belong to --choose" in capsys.readouterr().err


def test_values_by_kind_are_checked() -> None:
    for text, sentence in (
        ("pi4 local.batch-size=8", "is not 'kind: key=value"),
        ("a: x=1; a: x=2", "once for every kind"),
        ("a: local.batch-size", "is not key=value"),
    ):
        with pytest.raises(FedsplitError, match=sentence):
            ByKind(text)
    made = config(control__tune="by-kind", control__by_kind__give="phone: local.batch-size=8")
    with pytest.raises(FedsplitError, match="names 'phone'; the fleet has"):
        check(made, world(made))
    assert ByKind("a: local.batch-size=8, wire.topk.keep=0.5").kinds == {
        "a": {"local.batch-size": 8, "wire.topk.keep": 0.5}
    }
