"""The studies of the papers run with `--quick`; a file of their own, so that two workers share the studies."""

from __future__ import annotations

import pytest
from test_simulations import TINY, study

LESS = ["data.limit=120", "data.test-limit=20", "rounds=1"]


@pytest.mark.slow
def test_a_front_cache_changes_no_weight() -> None:
    rows = {row["config"]: row for row in study("front_cache.py", *TINY)["rows"]}
    assert list(rows) == ["linear_probe", "frozen_front", "sfprompt"]
    assert all(row["same_weights"] and 0 < row["device_flops_ratio"] < 1 for row in rows.values())


@pytest.mark.slow
def test_a_papers_scoreboard_has_every_arm_and_a_verdict_on_every_claim() -> None:
    smaller = ["data.limit=120", "data.test-limit=20", "rounds=1", "local.max-steps=1", "local.self-update.epochs=1"]
    found = study("paper.py", "sfprompt", *(word for pair in smaller for word in ("--set", pair)))
    rows = {(row["partition"], row["arm"]): row for row in found["rows"]}
    assert len(rows) == 2 * 6 + 2 and all(row["seeds"] == 1 and not row["failed"] for row in rows.values())
    for partition in ("iid", "dirichlet-0.1"):
        assert rows[partition, "fedavg"]["client_flops_ratio"] == rows[partition, "fedavg"]["bytes_ratio"] == 1.0
        # Split or not, it is the same training.
        assert rows[partition, "fedavg"]["accuracy_mean"] == rows[partition, "splitfed"]["accuracy_mean"]
        assert rows[partition, "sfprompt"]["kept_samples"] < rows[partition, "splitfed"]["kept_samples"]
    assert len(found["claims"]) == 7 and all(claim["verdict"] for claim in found["claims"])


@pytest.mark.slow
def test_the_scoreboard_of_d2ft_sets_equal_costs_side_by_side() -> None:
    found = study("paper.py", "d2ft", "--only", "main", *(word for pair in LESS for word in ("--set", pair)))
    rows = {row["arm"]: row for row in found["rows"]}
    assert len(rows) == 5 and not any(row["failed"] for row in rows.values())
    for arm in ("d2ft-full-0.6", "d2ft-full-random-0.6", "d2ft-lora-0.6"):
        assert rows[arm]["server_flops_ratio"] <= 0.6 and rows[arm]["traffic_ratio"] < 1
        assert rows[arm]["client_flops_ratio"] == 1.0
    assert rows["d2ft-lora-0.6"]["against"] == "d2ft-lora"
    assert len(found["claims"]) == 5 and all(claim["verdict"] for claim in found["claims"])


@pytest.mark.slow
def test_the_scoreboard_of_droppeft_has_times_to_a_target() -> None:
    found = study("paper.py", "droppeft", "--only", "main", *(word for pair in LESS for word in ("--set", pair)))
    rows = {row["arm"]: row for row in found["rows"]}
    assert len(rows) == 4 and not any(row["failed"] for row in rows.values())
    plain, dropped = rows["droppeft-none"], rows["droppeft"]
    assert all(plain[f"{kind}_speedup"] == 1.0 for kind in ("virtual", "wall", "compute"))
    assert dropped["server_flops_ratio"] == pytest.approx(3 / 7) and dropped["server_peak_ratio"] < 0.6
    assert len(found["claims"]) == 9 and all(claim["verdict"] for claim in found["claims"])
