"""What is installed, shipped and declared: metadata, pins, the wheel, Flower's table and bundle."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedsplit import config, manifest
from fedsplit.types import FedsplitError

SHIPPED = ("pyproject.toml", "setup.cfg", "LICENSE", "README.md", "fedsplit")
# Import names of what only the extras bring.
OPTIONAL = (
    "datasets",
    "flwr",
    "flwr_datasets",
    "grpc",
    "jinja2",
    "matplotlib",
    "ortools",
    "pandas",
    "peft",
    "psutil",
    "pyarrow",
    "ray",
    "sklearn",
    "tensorboard",
)


def copy_of(repository: Path, target: Path) -> Path:
    """What a build reads, so that a build leaves nothing in the repository."""
    target.mkdir()
    for name in SHIPPED:
        source = repository / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copyfile(source, target / name)
    return target


def code_files(repository: Path) -> set[str]:
    return {file.relative_to(repository).as_posix() for file in (repository / "fedsplit").rglob("*.py")}


def requirements(repository: Path) -> list[Requirement]:
    parser = configparser.ConfigParser()
    parser.read(repository / "setup.cfg", encoding="utf-8")
    texts = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    return [Requirement(line) for text in texts for line in text.splitlines() if line.strip()]


def pins(repository: Path) -> dict[str, Requirement]:
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in found}


def test_fedsplit_imports_from_another_folder(tmp_path: Path) -> None:
    code = "import fedsplit, fedsplit.config; print(fedsplit.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("__init__.py")


def test_flower_table_is_fresh() -> None:
    assert manifest.main(["--check"]) == 0, "run `python -m fedsplit.manifest`"


def test_flower_table_holds_every_key_with_its_default(repository: Path) -> None:
    app = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
    declared = dict(config.flatten(app["config"]))
    defaults = {name: key.default for name, key in config.keys().items()}
    assert declared == defaults
    assert {name: type(value) for name, value in declared.items()} == {
        name: key.type for name, key in config.keys().items()
    }


def test_a_stale_table_is_told_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pyproject.toml"
    file.write_text(f"[project]\n\n{manifest.BEGIN}\n[tool.flwr.app.config]\nold = 1\n{manifest.END}\n")
    assert manifest.main(["--check", "--file", str(file)]) == 1
    assert "old = 1" in file.read_text()
    assert manifest.main(["--file", str(file)]) == 0
    assert manifest.main(["--check", "--file", str(file)]) == 0
    assert "stale" in capsys.readouterr().err
    assert tomllib.loads(file.read_text())["tool"]["flwr"]["app"]["config"]["seed"] == 0


@pytest.mark.parametrize(
    "text", ["", "# >>> keys\n", "# <<< keys\n# >>> keys\n", "# >>> keys\n# >>> keys\n# <<< keys\n"]
)
def test_missing_markers_are_told(text: str) -> None:
    with pytest.raises(FedsplitError, match="pyproject.toml needs"):
        manifest.renew(text, config.keys().values())


def test_flower_finds_what_it_needs_and_no_dependencies(repository: Path) -> None:
    document = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))
    project, flower = document["project"], document["tool"]["flwr"]
    assert {"name", "version", "description"} <= set(project)
    assert "dependencies" not in project and "dependencies" in project["dynamic"]
    assert "federations" not in flower
    assert set(flower["app"]["components"]) == {"serverapp", "clientapp"}


def test_pins_cover_every_requirement(repository: Path) -> None:
    pinned = pins(repository)
    for requirement in requirements(repository):
        pin = pinned.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt does not pin {requirement.name}"
        (exact,) = pin.specifier
        assert requirement.specifier.contains(exact.version), f"{pin} is outside {requirement}"


def test_pins_are_exact_and_portable(repository: Path) -> None:
    for pin in pins(repository).values():
        assert re.fullmatch(r"==[0-9][0-9A-Za-z.]*", str(pin.specifier)), f"{pin} is not one plain version"
        assert pin.url is None
    # A CPU and a CUDA build both meet the pin of torch.
    assert pins(repository)["torch"].specifier.contains(str(pins(repository)["torch"].specifier)[2:] + "+cpu")


def imported(file: Path) -> set[str]:
    """The packages that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names} - {"fedsplit"} - sys.stdlib_module_names


def test_every_imported_package_is_declared(repository: Path) -> None:
    declared = {canonicalize_name(requirement.name) for requirement in requirements(repository)}
    declared |= {"ray"}  # flwr[simulation] pins its one version
    providers = importlib.metadata.packages_distributions()
    for file in sorted((repository / "fedsplit").rglob("*.py")):
        for package in imported(file):
            names = {canonicalize_name(name) for name in providers.get(package, [package])}
            assert names & declared, f"{file.relative_to(repository)} imports {package}, which setup.cfg does not name"


def test_the_core_imports_without_any_extra(repository: Path, tmp_path: Path) -> None:
    """A device installs no extra; `sys.modules[name] = None` makes an import of it fail."""
    code = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None
import fedsplit.config, fedsplit.step, fedsplit.round, fedsplit.doctor
fedsplit.config.load()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_licence_is_apache_2(repository: Path) -> None:
    text = (repository / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_continuous_integration_runs_make_test(repository: Path) -> None:
    script = repository / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8")


@pytest.mark.slow
def test_wheel_holds_all_code_and_the_weights(repository: Path, tmp_path: Path) -> None:
    source = copy_of(repository, tmp_path / "source")
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name.split("/")[0] for name in names if name.endswith("METADATA"))
        metadata = archive.read(f"{info}/METADATA").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    missing = code_files(repository) - names
    assert not missing, f"not in the wheel (a folder without __init__.py?): {sorted(missing)}"
    assert {"fedsplit/assets/fedsplit_micro.safetensors", "fedsplit/py.typed"} <= names
    assert {"fedsplit/report/page.css", "fedsplit/report/page.html.j2"} <= names
    assert {name.split("/")[0] for name in names} == {"fedsplit", info}
    assert "fedsplit = fedsplit.cli.main:main" in scripts
    assert "Requires-Dist: torch" in metadata and "Provides-Extra: device" in metadata
    assert any(name.endswith("LICENSE") for name in names)


@pytest.mark.slow
def test_flower_bundle_holds_all_code_and_little_else(repository: Path, tmp_path: Path) -> None:
    source = copy_of(repository, tmp_path / "source")
    environment = {**os.environ, "FLWR_HOME": str(tmp_path / "flwr")}
    code = "import sys; from flwr.cli.app import app; sys.argv = ['flwr', 'build', '--app', sys.argv[1]]; app()"
    command = [sys.executable, "-c", code, str(source)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "missing" not in done.stdout
    (bundle,) = tmp_path.glob("*.fab")
    assert bundle.stat().st_size < 5_000_000  # Flower refuses 10 MB
    with zipfile.ZipFile(bundle) as archive:
        names = set(archive.namelist())
    assert code_files(repository) - names == set()
    assert names - code_files(repository) == {"pyproject.toml", "LICENSE", ".info/CONTENT"}


@pytest.mark.slow
def test_a_run_in_which_every_test_is_skipped_fails(repository: Path, tmp_path: Path) -> None:
    shutil.copyfile(repository / "tests" / "conftest.py", tmp_path / "conftest.py")
    (tmp_path / "test_one.py").write_text("import unittest\n\n\ndef test_one():\n    raise unittest.SkipTest('no')\n")
    options = ["-q", "-n", "1", "-p", "no:cacheprovider", "-c", os.devnull]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "1 skipped" in done.stdout
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
