"""The studies of the papers; a file of their own, so that two workers share the studies.

Three scoreboards run together, two of them with fewer arms than by `--quick`, through all of `paper.py`; the arms
left out are built and checked, as the runs of a scoreboard are before they begin.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_simulations import ROOT, TINY, study_here

sys.path.append(str(ROOT / "simulations"))

import all as combination
import paper
from papers import PAPERS, scoreboard, work
from papers.figures import Results

from fedsplit.plan import account

LESS = ("data.limit=120", "data.test-limit=20", "rounds=1", "local.max-steps=4", "local.self-update.epochs=1")
# Arms that between them need every figure: two tables, an arm with a reference of its own, plans, a bandit, a clock.
FEW: dict[str, dict[str, tuple[str, ...]]] = {
    "sfprompt": {"quick_arms": ("fedavg", "splitfed", "sfprompt"), "quick_partitions": ("dirichlet-0.1",)},
    "d2ft": {"ablated_on": ()},
    "droppeft": {"quick_arms": ("droppeft-none", "droppeft", "droppeft-bandit-ptls"), "ablated_on": ()},
}
TRAINED = [name for name in PAPERS if name != "patrol"]  # which hardens first, in test_simulations_privacy.py


@pytest.mark.slow
@pytest.mark.study
def test_a_front_cache_changes_no_weight() -> None:
    rows = {row["config"]: row for row in study_here("front_cache.py", *TINY)["rows"]}
    assert list(rows) == ["linear_probe", "frozen_front", "sfprompt"]
    assert all(row["same_weights"] and 0 < row["device_flops_ratio"] < 1 for row in rows.values())


@pytest.mark.slow
@pytest.mark.study
def test_scoreboards_have_every_arm_and_a_verdict_on_every_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    boards = {name: replace(PAPERS[name], **fewer) for name, fewer in FEW.items()}
    monkeypatch.setattr(paper, "PAPERS", boards)
    pairs = [word for pair in LESS for word in ("--set", pair)]
    assert paper.main(["all", "--quick", "--out", str(tmp_path), *pairs]) == 0
    shown = capsys.readouterr().out
    found = json.loads(shown.strip().splitlines()[-1])
    rows = {row["arm"]: row for row in found["rows"]}
    assert not any(row["failed"] for row in rows.values()) and all(row["seeds"] == 1 for row in rows.values())
    assert {arm for board in boards.values() for arm in board.quick_arms} < set(rows)
    # Split or not, it is the same training.
    assert rows["fedavg"]["accuracy_mean"] == rows["splitfed"]["accuracy_mean"]
    assert rows["fedavg"]["client_flops_ratio"] == rows["fedavg"]["bytes_ratio"] == 1.0
    assert rows["sfprompt"]["kept_samples"] < rows["splitfed"]["kept_samples"]
    assert set(boards["sfprompt"].quick_ablations) <= set(rows)
    for arm in ("d2ft-full-0.6", "d2ft-full-random-0.6", "d2ft-lora-0.6"):
        assert rows[arm]["server_flops_ratio"] <= 0.6 and rows[arm]["traffic_ratio"] < 1
        assert rows[arm]["client_flops_ratio"] == 1.0
    assert rows["d2ft-lora-0.6"]["against"] == "d2ft-lora"
    plain, dropped = rows["droppeft-none"], rows["droppeft"]
    assert all(plain[f"{kind}_speedup"] == 1.0 for kind in ("virtual", "wall", "compute"))
    assert dropped["server_flops_ratio"] == pytest.approx(3 / 7) and dropped["server_peak_ratio"] < 0.6
    judged = [claim for board in boards.values() for claim in board.claims if {claim.arm, claim.against} <= set(rows)]
    assert len(found["claims"]) == len(judged) > 10 and all(claim["verdict"] for claim in found["claims"])
    assert {file.stem for file in tmp_path.glob("*.md")} == set(boards)


@pytest.mark.slow
@pytest.mark.study
@pytest.mark.parametrize("name", TRAINED)
def test_every_arm_of_a_quick_scoreboard_can_begin(name: str, tmp_path: Path) -> None:
    runs = scoreboard.runs(PAPERS[name], scoreboard.Request(tmp_path, seeds=1, quick=True, pairs=LESS[:3]))
    assert len({run.name for run in runs}) == len(runs) >= 3
    work.validate(runs, lambda line: None)


@pytest.mark.slow
@pytest.mark.study
def test_all_five_and_each_left_out_can_begin(tmp_path: Path) -> None:
    board = combination.board("")
    soft = replace(
        board, arms=tuple(replace(arm, harden=None, front="") for arm in board.arms)
    )  # without the weights to come
    runs = scoreboard.runs(soft, scoreboard.Request(tmp_path, seeds=1, pairs=("data.limit=300", "data.test-limit=20")))
    work.validate(runs, lambda line: None)
    configs = {run.arm: run.config for run in runs}
    assert len({tuple(config.values.items()) for config in configs.values()}) == len(runs) == 12
    assert set(configs) == {"fedavg", "all", *(f"no-{name}" for name, *_ in combination.WITHOUT)}
    attacked = [run.arm for run in runs if run.audit]
    assert attacked == ["all", "no-harden", "no-merge", "no-prompts", "no-codecs"], (
        "the others send what one of these does"
    )
    plans = {name: account(configs[name]) for name in ("fedavg", "all", "no-codecs")}
    assert plans["all"].total_bytes < plans["no-codecs"].total_bytes < plans["fedavg"].total_bytes / 10
    assert plans["all"].client_flops < plans["fedavg"].client_flops / 10
    for run in scoreboard.runs(board, scoreboard.Request(tmp_path, seeds=1)):
        hardened = run.hardening is not None and run.hardening.train == "all"
        assert hardened == (run.arm not in ("fedavg", "no-harden")), run.arm
        if hardened and run.hardening:
            own = "no-merge" if run.arm == "no-merge" else "all"
            assert Path(run.hardening.out).name == f"hardened-{own}-s0", "each front is hardened once"
            assert run.config.model.checkpoint == str(Path(run.hardening.out) / "model.safetensors")


def test_what_all_reached_is_read_from_its_runs() -> None:
    board = combination.board("")
    own = {"accuracy": 0.75, "client_flops": 5, "bytes_up": 3, "bytes_down": 1, "worst_ssim": 0.25, "curve": []}
    base = own | {"accuracy": 0.8, "client_flops": 100, "bytes_up": 50, "bytes_down": 30}
    place = board.partitions[0].name
    found = combination.figures(board, Results({(place, "all", 0): own, (place, "fedavg", 0): base}, [0]))
    wanted = {"accuracy_gap": 5.0, "bytes_ratio": 0.05, "client_flops_ratio": 0.05, "worst_ssim": 0.25}
    assert found == pytest.approx(wanted)
