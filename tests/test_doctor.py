"""`fedsplit doctor`, the mend of torchvision and the shipped files."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fedsplit import assets, compat, doctor
from fedsplit.doctor import machine, packages
from fedsplit.doctor.check import Check
from fedsplit.types import FedsplitError

HEAVY = {"flwr", "ray", "timm", "torchvision", "transformers"}
ASK = f"""
import sys
from fedsplit import doctor
before = {HEAVY!r} & set(sys.modules)
print(doctor.as_json(doctor.checks()))
print(sorted({HEAVY!r} & set(sys.modules) - before), file=sys.stderr)
"""


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_this_machine_has_no_errors_and_asking_is_quick_and_light(tmp_path: Path) -> None:
    start = time.monotonic()
    done = run_python(ASK, tmp_path)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["ok"], [check for check in document["checks"] if check["level"] == "error"]
    assert {"torch", "flwr", "ray", "peft", "torchvision", "fedsplit_micro.safetensors"} <= {
        check["name"] for check in document["checks"]
    }
    assert done.stderr.strip().endswith("[]"), "checks import what their metadata would tell"
    assert seconds < 30  # measured about 3; the bound leaves room for a busy machine


def test_report_shows_each_mend_under_its_row() -> None:
    rows = [
        Check("a", "ok", "fine"),
        Check("memory", "warning", "little", "Free some."),
        Check("b", "error", "gone", "Get it."),
    ]
    text = doctor.report(rows)
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["ok", "warning", "->", "error", "->"]
    assert lines[-1] == "3 checks, errors: 1, warnings: 1"
    document = json.loads(doctor.as_json(rows))
    assert document["ok"] is False
    assert document["checks"][1] == {
        "name": "memory",
        "level": "warning",
        "found": "little",
        "mend": "Free some.",
        "ok": False,
    }
    assert json.loads(doctor.as_json(rows[:2]))["ok"] is True


def test_a_check_that_fails_is_a_finding_and_the_others_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Check]:
        raise RuntimeError("boom")
        yield

    def absent() -> Iterator[Check]:
        raise ImportError("No module named 'torch'")
        yield

    monkeypatch.setattr(doctor, "GROUPS", (broken, absent, machine.processor))
    found = doctor.checks()
    assert [(check.name, check.level) for check in found] == [
        ("broken", "error"),
        ("absent", "error"),
        ("processor", "ok"),
    ]
    assert "boom" in found[0].found and "torch" in found[1].found


def test_a_missing_optional_package_is_a_warning_that_names_the_extra() -> None:
    optional = packages._package(Requirement("fedsplit-surely-absent>=1"), ["lora"])
    assert optional.level == "warning" and "fedsplit[lora]" in optional.mend
    core = packages._package(Requirement("fedsplit-surely-absent>=1"), [])
    assert core.level == "error" and "fedsplit-surely-absent>=1" in core.mend


@pytest.mark.parametrize("extras", [[], ["simulation"]])
def test_an_unsupported_version_is_an_error(extras: list[str]) -> None:
    found = packages._package(Requirement("numpy<1"), extras)
    assert found.level == "error" and "numpy<1" in found.mend


def test_a_torchvision_for_another_torch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_requirements", lambda package, extra: [Requirement("torch==1.0")])
    (found,) = packages.torchvision()
    assert found.level == "error" and "torch==1.0" in found.found


def test_ray_is_found_through_the_extra_of_flower() -> None:
    assert [one.name for one in packages._through_extras(Requirement("flwr[simulation]"))] == ["ray"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    found = machine._folder("run folders", blocker / "runs", "error", "name another folder.")
    assert found.level == "error" and found.mend == "Name another folder."
    fine = machine._folder("run folders", tmp_path / "a" / "b", "error", "name another folder.")
    assert fine.level != "error" and not (tmp_path / "a").exists()


@pytest.mark.parametrize(("free", "level"), [(3.9, "warning"), (4.1, "ok")])
def test_little_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch, free: float, level: str) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: (8 * machine.GIB, int(free * machine.GIB)))
    assert [check.level for check in machine.memory()] == [level]


def test_free_memory_is_within_the_total() -> None:
    total, free = machine.memory_bytes()
    assert 0 < free <= total


def test_a_running_superlink_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        monkeypatch.setenv("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", port)
        (running,) = machine.flower()
    (gone,) = machine.flower()
    assert running.level == "warning" and port in running.found and "environment" in running.mend
    assert gone.ok


def test_shipped_weights_are_intact_and_damage_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert all(check.ok for check in packages.weights())
    name = "fedsplit_micro.safetensors"
    copy = tmp_path / name
    shutil.copyfile(assets.locate(name), copy)
    with copy.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    monkeypatch.setattr(assets, "locate", lambda name: copy)
    assert "changed" in packages._weights(name, assets.SHA256[name]).found
    copy.write_bytes(b"short")
    assert "unreadable" in packages._weights(name, assets.SHA256[name]).found


def test_every_shipped_file_has_a_known_sum() -> None:
    folder = Path(assets.__file__).parent
    assert {file.name for file in folder.glob("*.safetensors")} == set(assets.SHA256)


def test_weights_are_found_beside_another_entry_of_sys_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A Flower bundle shadows the installed package with one that holds no weights."""
    elsewhere = tmp_path / "site" / "fedsplit" / "assets" / "only_there.safetensors"
    elsewhere.parent.mkdir(parents=True)
    elsewhere.touch()
    with pytest.raises(FedsplitError, match=r"pip install .*model\.checkpoint"):
        assets.locate("only_there.safetensors")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert assets.locate("only_there.safetensors") == elsewhere.resolve()


@pytest.mark.slow
def test_timm_peft_and_transformers_import_after_the_mend(tmp_path: Path) -> None:
    code = """
from fedsplit.compat import mend_torchvision
first = mend_torchvision()
assert mend_torchvision() == first
import torchvision, timm, peft, transformers
assert mend_torchvision() == first
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_mend_leaves_a_working_torchvision_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(compat, "operators_load", lambda: True)
    kept = list(compat._kept)
    assert compat.mend_torchvision() is False
    assert compat._kept == kept


def test_the_mend_does_nothing_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(compat, "_kept", [])
    monkeypatch.setattr(compat, "_find", lambda package: None)
    assert compat.mend_torchvision() is False


@pytest.mark.parametrize(
    ("there", "told"), [({"prometheus_client"}, True), ({"prometheus_client", "opencensus"}, False)]
)
def test_half_of_rays_dashboard_is_told(monkeypatch: pytest.MonkeyPatch, there: set[str], told: bool) -> None:
    real = machine.importlib.util.find_spec
    dashboard = ("prometheus_client", "opencensus")
    find = lambda name: (real("json") if name in there else None) if name in dashboard else real(name)  # noqa: E731
    monkeypatch.setattr(machine.importlib.util, "find_spec", find)
    said = [check.mend for check in machine.ray() if not check.ok]
    assert any("pip uninstall prometheus_client" in mend for mend in said) is told
