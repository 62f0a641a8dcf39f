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
from test_simulations import ROOT, TINY, study

sys.path.append(str(ROOT / "simulations"))

import paper
from papers import PAPERS, scoreboard, work

LESS = ("data.limit=120", "data.test-limit=20", "rounds=1", "local.max-steps=4", "local.self-update.epochs=1")
# Arms that between them need every figure: two tables, an arm with a reference of its own, plans, a bandit, a clock.
FEW: dict[str, dict[str, tuple[str, ...]]] = {
    "sfprompt": {"quick_arms": ("fedavg", "splitfed", "sfprompt"), "quick_partitions": ("dirichlet-0.1",)},
    "d2ft": {"ablated_on": ()},
    "droppeft": {"quick_arms": ("droppeft-none", "droppeft", "droppeft-bandit-ptls"), "ablated_on": ()},
}
TRAINED = [name for name in PAPERS if name != "patrol"]  # which hardens first, in test_simulations_privacy.py


@pytest.mark.slow
def test_a_front_cache_changes_no_weight() -> None:
    rows = {row["config"]: row for row in study("front_cache.py", *TINY)["rows"]}
    assert list(rows) == ["linear_probe", "frozen_front", "sfprompt"]
    assert all(row["same_weights"] and 0 < row["device_flops_ratio"] < 1 for row in rows.values())


@pytest.mark.slow
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
@pytest.mark.parametrize("name", TRAINED)
def test_every_arm_of_a_quick_scoreboard_can_begin(name: str, tmp_path: Path) -> None:
    runs = scoreboard.runs(PAPERS[name], scoreboard.Request(tmp_path, seeds=1, quick=True, pairs=LESS[:3]))
    assert len({run.name for run in runs}) == len(runs) >= 5
    work.validate(runs, lambda line: None)
