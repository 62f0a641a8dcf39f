"""`fedsplit bundle`, with an index and a half of the weights that cost nothing."""

from __future__ import annotations

import configparser
import importlib.metadata
import json
import os
import platform
import stat
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args
from packaging.requirements import Requirement

import fedsplit.runtime
from fedsplit.cli.main import main
from fedsplit.config import load
from fedsplit.deploy import certificates, files, node, own_wheel, wheels
from fedsplit.deploy.inputs import pins
from fedsplit.deploy.wheels import Target
from fedsplit.doctor import device
from fedsplit.types import FedsplitError

ARM = "manylinux_2_28_aarch64"
OWN = ["torch>=2", "timm", "flwr==1.41.*; extra == 'device'", "ray; extra == 'simulation'"]
INDEX: dict[str, tuple[str, list[str]]] = {
    "pip": ("25.0", []),
    "torch": ("2.13.0", ["sympy", "triton==3; platform_system == 'Windows'"]),
    "sympy": ("1.14.0", ["torch"]),  # a ring
    "timm": ("1.0.31", ["torch", "server[fast]>=1"]),
    "server": ("1.5", ["loop; extra == 'fast'", "slow; extra == 'slow'"]),
    "loop": ("0.2", ["arm; platform_machine == 'aarch64'", "intel; platform_machine == 'x86_64'"]),
    "arm": ("1.0", ["old; python_version < '3.12'"]),
    "old": ("1.0", []),
    "intel": ("1.0", []),
    "flwr": ("1.41.0", []),
    "ray": ("2.0", []),
}
PINS = "".join(f"{name}=={version}\n" for name, (version, _) in INDEX.items() if name != "pip")


def wheel(folder: Path, name: str, version: str, asks: list[str]) -> Path:
    file = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {one}" for one in asks),
    ]
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"{name}-{version}.dist-info/METADATA"), "\n".join(lines) + "\n")
    return file


class Index:
    """pip, of which every download is noted."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.wheels = dict(INDEX)

    def fetch(self, asked: str, target: Target, folder: Path) -> Path:
        self.asked.append(asked)
        name = Requirement(asked).name
        if name not in self.wheels:
            raise wheels.NotServed(f"no {asked}")
        return wheel(folder, name, *self.wheels[name])


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Index:
    made = Index()
    half = types.ModuleType("fedsplit.runtime.half")
    half.save = lambda config, path: path.write_bytes(b"the half of " + config.model.name.encode())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fedsplit.runtime.half", half)
    monkeypatch.setattr(fedsplit.runtime, "half", half, raising=False)
    monkeypatch.setattr(wheels, "download", made.fetch)
    monkeypatch.setattr(own_wheel, "build", lambda folder: wheel(folder, "fedsplit", "0.1.0", OWN))
    monkeypatch.setattr(device, "client_memory_bytes", lambda config: 12_345)
    return made


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deployment") / "certificates"
    certificates.certify(folder, ["lab.example.org"], nodes=2)
    return folder


@pytest.fixture
def options(tmp_path: Path, keys: Path) -> list[str]:
    (tmp_path / "pins.txt").write_text("# exact\n" + PINS)
    (tmp_path / "f.toml").write_text("[devices]\ncount = 4\n[local]\nbatch-size = 8\n")
    given = {
        "--config": tmp_path / "f.toml",
        "--out": tmp_path / "bundle",
        "--platform": ARM,
        "--superlink": "lab.example.org:9092",
        "--node": 1,
        "--certificates": keys,
        "--constraints": tmp_path / "pins.txt",
    }
    return ["bundle", *(str(one) for pair in given.items() for one in pair)]


def manifest(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "bundle.json").read_text())
    return found


def listed(folder: Path) -> Mapping[str, Mapping[str, object]]:
    entries = manifest(folder)["files"]
    assert isinstance(entries, dict)
    return entries


def test_a_bundle_holds_what_its_manifest_says(
    index: Index, options: list[str], keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options) == 0
    folder, out = tmp_path / "bundle", capsys.readouterr().out.splitlines()
    assert out[-1] == str(folder) and [line[:5] for line in out if line[0] == "["] == [
        "[1/4]",
        "[2/4]",
        "[3/4]",
        "[4/4]",
    ]
    there = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert there == {*listed(folder), "bundle.json"}, "nothing half-written is left"
    for name, entry in listed(folder).items():
        assert (files.sha256(folder / name), (folder / name).stat().st_size) == (entry["sha256"], entry["bytes"]), name
    texts = {"half.safetensors", "config.toml", "ca.crt", "node.key", "install.sh", node.UNIT}
    assert texts <= there
    assert {name.split("/")[1].split("-")[0] for name in there if name.startswith("wheels/")} == {
        *("fedsplit", "pip", "torch", "sympy", "timm", "server", "loop", "arm", "old", "flwr")
    }
    assert (folder / "node.key").read_bytes() == (keys / "node-1").read_bytes()
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir() if file.is_file()}
    assert modes == {name: {"node.key": 0o600, "install.sh": 0o755}.get(name, 0o644) for name in modes}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    config = load([folder / "config.toml"])
    assert config.local.batch_size == 8 and config.devices.count == 4
    assert (folder / "half.safetensors").read_bytes() == b"the half of " + config.model.name.encode()
    about = manifest(folder)
    assert about["requirement"] == "fedsplit[device]==0.1.0" and about["client_memory_bytes"] == 12_345
    assert (about["node"], about["nodes"], about["platform"]) == (1, 4, ARM)


def test_conditions_are_those_of_the_device(index: Index, options: list[str], tmp_path: Path) -> None:
    options[options.index(ARM)] = "manylinux_2_28_x86_64"
    assert main([*options, "--python", "3.13", "--extra", "simulation"]) == 0
    found = {Requirement(asked).name for asked in index.asked}
    assert "intel" in found and "ray" in found and not {"arm", "old", "slow", "triton"} & found


def test_what_is_there_is_not_downloaded_again(index: Index, options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    assert main(options) == 0
    first = listed(folder)
    assert len(index.asked) == len(set(index.asked)) == 9
    index.asked.clear()
    assert main(options) == 0
    assert index.asked == [] and listed(folder) == first
    with (folder / "wheels" / "timm-1.0.31-py3-none-any.whl").open("ab") as file:
        file.write(b"torn")
    assert main(options) == 0
    assert index.asked == ["timm==1.0.31"] and listed(folder) == first
    index.asked.clear()
    index.wheels["sympy"] = ("1.15.0", [])
    assert main([*options, "--pin", "sympy=1.15.0"]) == 0
    assert index.asked == ["sympy==1.15.0"]
    assert [file.name for file in (folder / "wheels").glob("sympy*")] == ["sympy-1.15.0-py3-none-any.whl"]


def test_a_bundle_that_stopped_goes_on(index: Index, options: list[str], tmp_path: Path) -> None:
    folder, server = tmp_path / "bundle", index.wheels.pop("server")
    assert main(options) == 2
    assert not (folder / "bundle.json").exists(), "without its manifest it is not complete"
    before = set(index.asked) - {"server==1.5"}
    assert {"pip", "torch==2.13.0", "timm==1.0.31"} <= before
    index.wheels["server"] = server
    index.asked.clear()
    assert main(options) == 0
    assert not before & set(index.asked) and "server==1.5" in index.asked
    assert not list(folder.glob(".*"))


def test_without_a_node_a_bundle_has_no_key(index: Index, options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    assert main(options) == 0
    for option in ("--node", "--certificates"):
        place = options.index(option)
        del options[place : place + 2]
    assert main(options) == 0
    assert not {"node.key", "ca.crt", node.UNIT} & ({file.name for file in folder.iterdir()} | set(listed(folder)))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--platform", "win_amd64"], "--platform 'win_amd64' is not known"),
        (["--platform", "manylinux_2_5_aarch64"], "is not known"),
        (["--python", "3.10"], "--python must be 3.11 or newer"),
        (["--superlink", "lab"], "not HOST:PORT"),
        (["--superlink", "lab:99999"], "not HOST:PORT"),
        (["--superlink", 'lab";x:1'], "not HOST:PORT"),
        (["--superlink", "elsewhere:9092"], "not valid for elsewhere"),
        (["--node", "4"], "--node must be from 0 to 3"),
        (["--node", "3"], "fedsplit certify"),
        (["--data", "relative"], "--data 'relative'"),
        (["--data", "/a'b"], "without quotes"),
        (["--pin", "torch"], "not NAME=VERSION"),
        (["--constraints", "/nowhere.txt"], "Cannot read the constraints"),
        (["--pin", "flwr=1.40.0"], "fedsplit needs flwr==1.41.*, but the bundle has 1.40.0"),
    ],
)
def test_what_cannot_be_bundled_is_one_sentence(
    index: Index, options: list[str], more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    index.wheels["flwr"] = ("1.40.0", [])
    assert main([*options, *more, "--quiet"]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_a_torch_for_cuda_is_refused_unless_asked_for(
    index: Index, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    index.wheels |= {"torch": ("2.13.0", ["cuda-toolkit[cudart]==13; platform_system == 'Linux'"])}
    index.wheels |= {"cuda-toolkit": ("13", [])}
    assert main(options) == 2
    said = capsys.readouterr().err
    assert "built for CUDA" in said and "PIP_EXTRA_INDEX_URL" in said and "cuda-toolkit==13" not in index.asked
    assert main([*options, "--torch", "any"]) == 0
    assert "cuda-toolkit==13" in index.asked


def test_another_folder_or_machine_is_refused(
    index: Index, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    assert main(options) == 2
    assert "holds other files" in capsys.readouterr().err and [file.name for file in folder.iterdir()] == ["mine.txt"]
    (folder / "mine.txt").unlink()
    assert main(options) == 0
    assert main([*options, "--python", "3.12"]) == 2
    assert f"a bundle for {ARM} and Python 3.11" in capsys.readouterr().err


def test_pip_is_asked_for_every_older_platform_and_no_dependencies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, seen = Target(ARM, "3.11"), []

    def run(command: list[str], **_: object) -> types.SimpleNamespace:
        seen.extend(command)
        assert list(tmp_path.glob("*.whl")) == []
        wheel(Path(command[command.index("--dest") + 1]), "numpy", "2.4.6", [])
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    assert wheels.download("numpy==2.4.6", target, tmp_path) == tmp_path / "numpy-2.4.6-py3-none-any.whl"
    asked = [seen[place + 1] for place, word in enumerate(seen) if word == "--platform"]
    assert asked[0] == ARM and {"manylinux_2_17_aarch64", "manylinux2014_aarch64", "linux_aarch64"} <= set(asked)
    assert "manylinux_2_29_aarch64" not in asked and {"--no-deps", ":all:"} <= set(seen)
    assert seen[seen.index("--python-version") + 1] == "3.11"


@pytest.mark.parametrize(
    ("said", "kind", "says"),
    [
        ("ERROR: No matching distribution found for x==1", wheels.NotServed, "no wheel of x==1 for manylinux_2_28"),
        ("WARNING: a\nERROR: No space left on device\n", FedsplitError, r"\(No space left on device\)"),
        ("", FedsplitError, "no reason given"),
    ],
)
def test_a_failure_of_pip_is_one_sentence_and_leaves_nothing(
    said: str, kind: type[FedsplitError], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = types.SimpleNamespace(returncode=1, stderr=said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(kind, match=says):
        wheels.download("x==1", Target(ARM, "3.11"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_unit_gives_flower_the_keys_of_the_node() -> None:
    keys = node.node_config(3, 8, data="/srv/my data")
    text = node.unit("lab.example.org:9092", keys)
    parser = configparser.RawConfigParser(strict=False, comment_prefixes=("#",), delimiters=("=",))
    parser.read_string(text.replace("\\\n", ""))
    start = parser["Service"]["ExecStart"]
    given = start.split('--node-config "')[1].split('"')[0]
    assert parse_config_args([given]) == keys
    assert keys["partition-id"] == 3 and keys["num-partitions"] == 8 and keys["data"] == "/srv/my data"
    assert {"state", "half", "root-certificates", "cache"} <= set(keys) and "data" not in node.node_config(0, 1)
    assert "--superlink lab.example.org:9092 " in start and "--insecure" not in text
    assert f"--root-certificates {node.PREFIX}/ca.crt" in start
    assert f"--auth-supernode-private-key {node.PREFIX}/node.key" in start
    service = parser["Service"]
    assert service["Restart"] == "always" and parser["Unit"]["StartLimitIntervalSec"] == "0"
    assert service["NoNewPrivileges"] == "yes" and service["ProtectSystem"] == "strict"
    assert f"/var/lib/{service['StateDirectory']}" == node.STATE and keys["state"] == f"{node.STATE}/state"
    assert "OMP_NUM_THREADS=1 MALLOC_ARENA_MAX=2" in text and "\n#MemoryMax=" in text


@pytest.fixture
def here(index: Index, options: list[str], tmp_path: Path) -> Iterator[Path]:
    """A bundle for this machine, as far as its script looks."""
    if platform.machine() not in ("x86_64", "aarch64") or platform.libc_ver()[0] != "glibc":
        pytest.skip("the script is for Linux with glibc")
    options[options.index(ARM)] = f"manylinux_2_17_{platform.machine()}"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert main([*options, "--python", version, "--quiet"]) == 0
    yield tmp_path / "bundle"


def installed(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(folder / "install.sh"), "--no-service", "--prefix", str(folder.parent / "there"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": ""})


def test_the_script_refuses_a_bundle_that_was_changed_and_another_python(here: Path) -> None:
    done = installed(here, "--python", "no-such-python")
    assert done.returncode == 2 and "no no-such-python here" in done.stderr
    (here / "config.toml").write_text("changed = 1")
    done = installed(here, "--python", sys.executable)
    assert done.returncode == 2 and "config.toml is not as it was sent" in done.stderr
    script = (
        (here / "install.sh").read_text().replace(f"({sys.version_info.major}, {sys.version_info.minor})", "(3, 99)")
    )
    (here / "install.sh").write_text(script)
    done = installed(here, "--python", sys.executable)
    assert done.returncode == 2 and "the wheels are for Python" in done.stderr
    assert not (here.parent / "there").exists()
    assert "@" not in script.replace('"$@"', ""), "a place was not filled"


@pytest.mark.slow
def test_the_own_wheel_of_an_installation_is_that_of_its_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = own_wheel.build(tmp_path)
    with zipfile.ZipFile(built) as archive:
        names = [name for name in archive.namelist() if not name.endswith("RECORD")]
        archive.extractall(tmp_path / "site")
        contents = {name: archive.read(name) for name in names}
    assert "fedsplit/deploy/bundle.py" in names and "fedsplit/assets/fedsplit_micro.safetensors" in names
    asked = wheels._requirements(built)
    assert {one.name for one in asked if one.marker and "device" in str(one.marker)} >= {"flwr", "grpcio", "pyarrow"}
    (info,) = (tmp_path / "site").glob("*.dist-info")
    (info / "INSTALLER").write_text("pip")
    with (info / "RECORD").open("a") as record:
        record.write(f"{info.name}/INSTALLER,,\n../../bin/fedsplit,,\nfedsplit/__pycache__/x.pyc,,\n")
    found = importlib.metadata.PathDistribution(info)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: found)
    (packed := tmp_path / "packed").mkdir()
    with zipfile.ZipFile(own_wheel._from_installed(packed)) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")} == contents
        assert archive.read(f"{info.name}/RECORD").decode().count("sha256=") == len(contents)


def test_versions_are_those_of_the_checkout_and_of_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pins(None, {})["flwr"] == "1.41.0" and pins(None, {"Flwr": "2"})["flwr"] == "2"
    monkeypatch.setattr(own_wheel, "checkout_file", lambda name: None)
    installed = pins(None, {})
    assert installed["torch"] == importlib.metadata.version("torch").partition("+")[0] and "fedsplit" not in installed
    (tmp_path / "loose.txt").write_text("torch>=2\n")
    with pytest.raises(FedsplitError, match="does not pin one version"):
        pins(tmp_path / "loose.txt", {})
