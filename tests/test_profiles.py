"""Profiles, fleets of them, whether a part fits, and calibration."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleets import TINY

from fedsplit import experiment
from fedsplit.cli.main import main
from fedsplit.config import load, resolve
from fedsplit.devices import calibrate
from fedsplit.devices.profiles import FIGURES, catalogue, fleet_of, profile, shipped
from fedsplit.plan import account
from fedsplit.runtime.inprocess import Loop
from fedsplit.types import FedsplitError
from fedsplit.world import world

NAMES = sorted(catalogue())
# Sane ranges of a board, phone or laptop.
RANGES = {
    "flops_per_s": (5e9, 2e13), "memory_bytes": (2**30, 2**37), "storage_bytes": (8e9, 2e12),
    "bytes_per_s": (1e5, 2e8), "latency_s": (0.001, 0.2), "active_w": (2, 100), "idle_w": (0.2, 15),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_is_plausible_and_each_figure_has_its_source(name: str) -> None:
    text = catalogue()[name].read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if "=" in line.partition("#")[0] and not line.startswith("short")]
    assert len(lines) == len(FIGURES) and all(len(line.partition("# ")[2]) > 15 for line in lines)
    found = profile(name)
    for figure in FIGURES:
        low, high = next(span for end, span in RANGES.items() if figure.endswith(end))
        assert low <= getattr(found, figure) <= high, figure
    for kind in ("train", "infer"):
        assert getattr(found, f"{kind}_fp16_flops_per_s") >= getattr(found, f"{kind}_fp32_flops_per_s")
    for precision in ("fp32", "fp16"):
        assert getattr(found, f"infer_{precision}_flops_per_s") >= getattr(found, f"train_{precision}_flops_per_s")
    assert found.down_bytes_per_s >= found.up_bytes_per_s and found.active_w > found.idle_w


def test_profiles_go_by_short_names_too_and_configs_link_to_them(repository: Path) -> None:
    short = {tomllib.loads(file.read_text(encoding="utf-8"))["short"] for file in catalogue().values()}
    assert len(short) == len(NAMES) and {"pi4", "pi5", "tx2", "phone", "phone-mid"} <= short
    assert profile("pi4") is profile("raspberry-pi-4") and len(set(shipped().values())) == len(NAMES)
    assert sorted(file.stem for file in (repository / "configs" / "devices").glob("*.toml")) == NAMES


def fleet(**values: Any) -> list[str]:
    """The names of a fleet."""
    config = resolve({f"devices.{name.replace('_', '-')}": value for name, value in values.items()})
    return [profile.name for profile in fleet_of(config, config.devices.count)]


def test_a_mixture_is_dealt_in_proportion_and_by_seed() -> None:
    mixed = fleet(fleet="pi4:6,orin-nano:3,phone:1", count=10)
    assert Counter(mixed) == {"raspberry-pi-4": 6, "orin-nano": 3, "pixel-7": 1}
    assert mixed == fleet(fleet="pi4:6,orin-nano:3,phone:1", count=10)
    assert mixed != sorted(mixed, key=["raspberry-pi-4", "orin-nano", "pixel-7"].index), "not in blocks"
    assert Counter(fleet(fleet="pi4:0.5,laptop:0.5", count=5)) == {"raspberry-pi-4": 3, "laptop": 2}
    assert fleet(fleet="tx2", count=2) == ["jetson-tx2"] * 2 and fleet(count=2) == ["uniform"] * 2
    for count in range(1, 30):
        shares = Counter(fleet(fleet="pi4:5,pi5:3,tx2:2,laptop:1", count=count))
        for name, weight in (("raspberry-pi-4", 5), ("raspberry-pi-5", 3), ("jetson-tx2", 2), ("laptop", 1)):
            assert abs(shares[name] - count * weight / 11) < 1


def test_jitter_is_log_normal_around_the_profile() -> None:
    config = resolve({"devices.fleet": "pi5", "devices.jitter": 0.5})
    base, many = profile("pi5"), fleet_of(config, 2000)
    assert many == fleet_of(config, 2000) and many[:10] == fleet_of(config, 10)
    for name in ("train_fp32_flops_per_s", "up_bytes_per_s", "down_bytes_per_s"):
        logs = np.log([getattr(one, name) / getattr(base, name) for one in many])
        assert abs(logs.mean()) < 0.05 and abs(logs.std() - 0.5) < 0.05
    assert {one.memory_bytes for one in many} == {base.memory_bytes}


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    text = catalogue()["laptop"].read_text(encoding="utf-8")
    file = tmp_path / "own.toml"
    file.write_text(text, encoding="utf-8")
    assert Counter(fleet(fleet=f"{file}:1,pi4:1", count=4)) == {"own": 2, "raspberry-pi-4": 2}
    wrong = {
        "short": ("idle-w", "watts", "unknown key 'watts'"),
        "missing": ("idle-w", "# idle-w", "'idle-w' is missing"),
        "text": ("latency-s = ", "latency-s = 'a' #", "latency-s must be a number"),
        "negative": ("latency-s = ", "latency-s = -", "must be a number of at least 0"),
        "toml": ("latency-s = ", "latency-s", "is not valid TOML"),
    }
    for old, new, message in wrong.values():
        file.write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(FedsplitError, match=message):
            fleet(fleet=str(file), count=1)


@pytest.mark.parametrize(
    "names, message",
    [
        ("pi7", "did you mean 'pi"),
        ("pi4:x", "needs a weight above 0"),
        ("pi4:0", "needs a weight above 0"),
        (",", "names no profile"),
        ("/nowhere/board.toml:2", "Cannot read the device profile /nowhere/board.toml"),
    ],
)
def test_a_fleet_that_cannot_be_had_is_one_sentence(names: str, message: str) -> None:
    with pytest.raises(FedsplitError, match=message):
        fleet(fleet=names, count=3)


def test_a_part_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path, repository: Path) -> None:
    file = tmp_path / "little.toml"
    text = catalogue()["raspberry-pi-4"].read_text(encoding="utf-8")
    config = resolve({**TINY, "devices.fleet": f"pi5,{file}", "local.batch-size": 8})
    file.write_text(text, encoding="utf-8")
    peak = account(config).client_peak_bytes
    for had, fits in ((int(1.2 * peak), True), (int(0.8 * peak), False)):
        file.write_text(text.replace("memory-bytes = 4294967296", f"memory-bytes = {had}"), encoding="utf-8")
        if fits:
            account(config)
            continue
        sentence = (
            rf"device \d \(little\) needs [\d,]+ bytes of memory for its part and has {had:,}; set a smaller local"
        )
        with pytest.raises(FedsplitError, match=sentence):
            account(config)
        with pytest.raises(FedsplitError, match=sentence):
            experiment.run(config.replace(out=str(tmp_path / "run")), Loop(config))
        assert not (tmp_path / "run").exists()
    small = [f"{key}={json.dumps(value)}" for key, value in TINY.items() if key not in ("model.name", "cut.front")]
    keep = load([repository / "configs/papers/sfprompt.toml"], small)
    file.write_text(text.replace("storage-bytes = 32000000000", "storage-bytes = 1000"), encoding="utf-8")
    keep = keep.replace(devices__fleet=str(file), front__cache_memory_bytes=0)
    with pytest.raises(FedsplitError, match=r"needs [\d,]+ bytes of storage .* front.cache-disk-bytes"):
        account(keep)


@pytest.mark.parametrize("shape", ["u-shape", "vanilla", "none"])
def test_calibration_divides_counted_work_by_measured_time(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[float] = []

    def timed(work: Any, *_: Any) -> float:
        work()
        steps.append(0.0)
        return 8.0 if len(steps) % 2 else 2.0  # a step, then a forward pass

    monkeypatch.setattr(calibrate, "_median_s", timed)
    config = resolve({**TINY, "cut.shape": shape, "cut.front": 0 if shape == "none" else 1, "train": "all"})
    found, flops = calibrate.measure(config), world(config).flops
    share = flops.front + (0 if shape == "vanilla" else flops.tail)
    assert found.train_flops_per_s == pytest.approx(5 * share / 8.0)
    assert found.infer_flops_per_s == pytest.approx(5 * flops.score / 2.0)
    frozen = config.replace(train="tail") if shape == "u-shape" else config
    if frozen is not config:
        flops, again = world(frozen).flops, calibrate.measure(frozen)
        left = 8.0 - 5 * flops.front / again.infer_flops_per_s
        assert again.train_flops_per_s == pytest.approx(5 * flops.tail / left)
    one, text = calibrate.profile_of(config.replace(devices__up_bytes_per_s=7.0), found, "here")
    file = tmp_path / "here.toml"
    file.write_text(text, encoding="utf-8")
    assert profile(str(file)) == one and one.up_bytes_per_s == 7.0 and one.memory_bytes > 2**28


def test_doctor_writes_a_profile_that_a_fleet_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "here.toml"
    pairs = [word for key, value in TINY.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    assert main(["doctor", "--calibrate", "--out", str(file), "--json", *pairs]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["file"] == str(file) and said["train_flops_per_s"] > 0 and said["infer_flops_per_s"] > 0
    assert fleet(fleet=str(file), count=2) == ["here", "here"]
    for wrong in (["--calibrate"], ["--calibrate", "--out", "/nowhere/x.toml"], ["--out", str(file)]):
        assert main(["doctor", *wrong]) == 2


@pytest.mark.study
def test_the_study_of_calibration(repository: Path) -> None:
    command = [sys.executable, str(repository / "simulations" / "calibration.py"), "--quick", "--only", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads(done.stdout.strip().splitlines()[-1])["rows"]
    assert row["predicted_s"] > 0 and row["measured_s"] > 0
    assert row["error"] == pytest.approx(row["predicted_s"] / row["measured_s"] - 1)
