"""The studies of privacy run with `--quick`: harden, train, attack."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from test_simulations import ROOT, study_here

sys.path.append(str(ROOT / "simulations"))

import pareto

LESS = ["--set", "data.limit=100", "--set", "data.test-limit=60"]


@pytest.mark.slow
@pytest.mark.study
def test_the_scoreboard_of_patrol_hardens_trains_and_attacks() -> None:
    found = study_here("paper.py", "patrol", "--jobs", "1", *LESS)
    rows = {row["arm"]: row for row in found["rows"]}
    assert set(rows) == {"patrol-none", "patrol-full", "patrol-noise"} and not any(r["failed"] for r in rows.values())
    assert rows["patrol-full"]["client_flops_ratio"] <= 1.0, "four blocks of half the width are two"
    assert rows["patrol-noise"]["worst_ssim"] < rows["patrol-none"]["worst_ssim"] <= 1
    judged = {claim["figure"] for claim in found["claims"]}
    assert judged == {"ssim", "accuracy_points", "client_flops_ratio", "ssim_gap"}
    assert all(claim["ours"] is not None for claim in found["claims"])


@pytest.mark.slow
@pytest.mark.study
def test_points_of_privacy_against_accuracy() -> None:
    rows = study_here("pareto.py", *LESS, "--cuts", "0", "--defences", "none,shuffle")["rows"]
    assert [(row["defence"], row["strength"]) for row in rows] == [("none", ""), ("shuffle", "0.5"), ("shuffle", "1.0")]
    assert rows[0]["worst_ssim"] > 0.98, "patches are solved for exactly"
    assert rows[2]["worst_ssim"] < rows[0]["worst_ssim"] and rows[2]["client_flops"] == rows[0]["client_flops"]
    assert any(row["front"] for row in rows)


def test_defences_are_matched_at_equal_accuracy() -> None:
    def row(cut: int, defence: str, strength: str, accuracy: float, ssim: float) -> dict[str, Any]:
        return {"cut": cut, "defence": defence, "strength": strength, "accuracy": accuracy, "worst_ssim": ssim}

    rows = [
        row(1, "none", "", 0.5, 0.9),
        row(1, "noise", "0.3", 0.6, 0.8),
        row(1, "noise", "1", 0.495, 0.7),
        row(1, "noise", "3", 0.48, 0.6),
        row(1, "merge", "4", 0.3, 0.1),
        row(2, "noise", "1", 0.5, 0.5),
    ]
    assert [(r["defence"], r["strength"]) for r in pareto.matched(rows)] == [("noise", "1"), ("none", "")]
    assert pareto.matched(rows[1:]) == [], "nothing to be equal to"
