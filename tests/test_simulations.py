"""Every study runs with `--quick` and ends in one line of JSON."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--set", "data.limit=100", "--set", "data.test-limit=20", "--set", "data.alpha=5.0", "--set", "rounds=2"]


def study(name: str, *arguments: str) -> Any:
    command = [sys.executable, str(ROOT / "simulations" / name), "--quick", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ}, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def study_here(name: str, *arguments: str) -> Any:
    """A study that measures nothing of its process, run as a script in this one: torch is imported once for all."""
    command, shown = [str(ROOT / "simulations" / name), "--quick", *arguments], io.StringIO()
    path = [*sys.path, str(ROOT / "simulations")]
    with mock.patch.multiple(sys, argv=command, path=path), contextlib.redirect_stdout(shown):
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as ended:
            assert not ended.code, shown.getvalue()[-2000:]
    return json.loads(shown.getvalue().strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.study
def test_overhead_ends_in_the_same_weights() -> None:
    found = study_here("overhead.py", *TINY, "--set", "devices.count=4")
    assert found["largest_weight_difference"] == 0.0
    assert found["in_process_ratio"] > 0 and found["flwr_ratio"] > 0 and found["flwr_startup_s"] > 0


@pytest.mark.slow
@pytest.mark.study
def test_baselines_agree_where_they_must() -> None:
    rows = {
        row["config"]: row
        for row in study("baselines.py", *TINY, "--set", "local.max-steps=1", "--set", "engine.workers=1")["rows"]
    }
    assert len(rows) == 9
    # Split or not, averaged in parallel it is the same training.
    assert rows["fedavg"]["accuracy"] == rows["splitfed_v1"]["accuracy"]
    assert rows["linear_probe"]["up_bytes"] < rows["fedpeft_lora"]["up_bytes"] < rows["fedavg"]["up_bytes"]
    assert rows["splitfed_v1"]["client_flops"] < rows["fedavg"]["client_flops"]


@pytest.mark.slow
@pytest.mark.study
def test_scale_says_what_a_run_holds_in_memory_and_on_disk(tmp_path: Path) -> None:
    size = ["--devices", "30", "--per-round", "3", "--rounds", "4"]
    found = study("scale.py", *size, "--out", str(tmp_path / "run"))
    assert (found["devices"], found["per_round"], found["rounds"]) == (30, 3, 4)
    # Four rounds of a process with torch; whether memory stays flat takes a hundred.
    assert found["peak_rss_bytes"] >= max(found["start_rss_bytes"], found["late_rss_bytes"]) > 10**8
    assert found["rss_growth_bytes"] == found["late_rss_bytes"] - found["early_rss_bytes"]
    assert found["start_s"] > 0 and found["round_s"] > 0
    kept = sum(file.stat().st_size for file in (tmp_path / "run" / "clients").rglob("*.safetensors"))
    assert 0 < kept == found["clients_bytes"] < found["disk_bytes"]


@pytest.mark.slow
@pytest.mark.study
def test_faults_are_held() -> None:
    rows = study("faults.py", "--where", "simulation")["rows"]  # test_broken_devices.py has the stream
    assert len(rows) >= 8 and all(row["held"] for row in rows)


@pytest.mark.slow
@pytest.mark.study
def test_the_stream_to_the_body_is_measured_against_a_bare_one() -> None:
    rows = study("link.py", "--pairs", "2")["rows"]
    assert {(row["size"], row["tls"], row["sessions"]) for row in rows} == {
        (size, tls, sessions) for size in ("4 KB", "1 MB", "10 MB") for tls in (False, True) for sessions in (1, 8)
    }
    for row in rows:
        assert row["round_trips_per_s"] > 0 and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]


@pytest.mark.slow
@pytest.mark.study
def test_devices_come_and_go_at_a_served_body() -> None:
    found = study("soak.py", "--sessions", "6")
    assert found["finished"] > 6 and found["died"] > 0 and found["cuts"] > 0 and found["refused"] == 0
    assert found["finished"] + found["died"] <= found["opened"] <= found["finished"] + found["died"] + 6
    assert found["packets"] > 10 * found["finished"] and found["bytes"] > 10**4 * found["packets"]
    for when in ("start", "after_a_tenth", "end", "most"):
        assert set(found[when]) == {"rss_bytes", "threads", "open_files"}
    assert isinstance(found["slope_bytes_per_minute"], int) and found["samples"] > 5


@pytest.mark.slow
@pytest.mark.study
def test_a_device_holds_its_half_alone() -> None:
    half, whole = study("device_memory.py")["rows"]
    assert (half["kind"], whole["kind"]) == ("half", "whole") and half["steps"] == whole["steps"] == 3
    assert 0 < 4 * half["weight_bytes"] < whole["weight_bytes"]
    # What is trained is the same, and so is what is counted of it; the plan knows it before.
    assert half["plan_bytes"] == half["counted_bytes"] == whole["counted_bytes"] > half["weight_bytes"]
    for row in (half, whole):
        assert 0 < row["imports_bytes"] <= row["training_bytes"] and 0 < row["rest_private_bytes"] < row["rest_bytes"]


@pytest.mark.slow
@pytest.mark.study
def test_plans_cost_less_compute_and_memory_than_all_in_full() -> None:
    found = study("body_cost.py", "--plans", "1", "--repeats", "1", "--batch-size", "4")
    rows = {(row["mode"], row["plan"], row["budget"]): row for row in found["rows"]}
    assert len(rows) == 2 * 2 * 6
    for mode, plan, budget in rows:
        row = rows[mode, plan, budget]
        assert row["wall_ratio"] > 0
        if budget == 1.0:
            assert row["flops_ratio"] == row["memory_ratio"] == 1.0
        elif plan == "layerdrop":  # whole blocks, of eight
            assert row["flops_ratio"] == pytest.approx(1 - round(8 * (1 - budget)) / 8, abs=0.02)
            assert row["memory_ratio"] == pytest.approx(row["flops_ratio"], abs=0.02)
    for mode in ("full", "lora"):
        assert rows[mode, "knapsack", 0.2]["flops_ratio"] < rows[mode, "knapsack", 0.8]["flops_ratio"] < 1.0
    assert found["worst_memory_at_half"] <= found["memory_aim"]


@pytest.mark.slow
@pytest.mark.study
def test_the_attack_on_the_small_cnn_beats_the_mean_image(tmp_path: Path) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    for name, count in (("train", 60), ("test", 40)):
        draw, cells = np.random.default_rng(count), []
        for coarse in draw.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8):
            buffer = io.BytesIO()
            Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue()})
        pq.write_table(
            pa.table({"image": cells, "label": [i % 10 for i in range(count)]}), tmp_path / f"{name}.parquet"
        )
    less = ["--limit", "40", "--auxiliary", "20", "--images", "2", "--steps", "40", "--threads", "1"]
    which = ["--data", str(tmp_path), "--layers", "conv11,ReLU22", "--attacks", "rmle"]
    rows = study("inversion_cnn.py", *which, *less)["rows"]
    assert [(row["attack"], row["layer"]) for row in rows] == [("mean", ""), ("rmle", "conv11"), ("rmle", "ReLU22")]
    mean, early, late = (row["psnr"] for row in rows)
    assert mean < late < early and rows[1]["published_psnr"] == 37.59
