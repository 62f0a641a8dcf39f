"""The wheel of the fedsplit that runs: built from its checkout, or packed again from where it is installed."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import fedsplit
from fedsplit.types import FedsplitError

SOURCES = ("pyproject.toml", "setup.cfg", "LICENSE", "README.md", "fedsplit")
# What an installer wrote about the installation, and the scripts that it made.
INSTALLED = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
DATE = (1980, 1, 1, 0, 0, 0)  # the same code gives the same bytes


def build(folder: Path) -> Path:
    """Put the wheel into `folder`; returns its path there.

    Raises:
        FedsplitError: it cannot be built.
    """
    root = Path(fedsplit.__file__).resolve().parents[1]
    if (root / "pyproject.toml").is_file() and (root / "setup.cfg").is_file():
        return _from_checkout(root, folder)
    return _from_installed(folder)


def checkout_file(name: str) -> Path | None:
    """A file of the checkout that fedsplit runs from, such as "constraints.txt"; None where there is none."""
    file = Path(fedsplit.__file__).resolve().parents[1] / name
    return file if file.is_file() and (file.parent / "setup.cfg").is_file() else None


def _from_checkout(root: Path, folder: Path) -> Path:
    with tempfile.TemporaryDirectory(prefix=".build.", dir=folder) as scratch:
        copy = Path(scratch)  # a build leaves its traces there
        for name in SOURCES:
            if (root / name).is_dir():
                shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif (root / name).is_file():
                shutil.copyfile(root / name, copy / name)
        code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
        environment = {**os.environ, "SOURCE_DATE_EPOCH": "315532800"}
        done = subprocess.run([sys.executable, "-c", code], cwd=copy, env=environment, capture_output=True, text=True)
        found = list((copy / "dist").glob("*.whl"))
        if done.returncode or len(found) != 1:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise FedsplitError(f"Cannot build fedsplit's own wheel ({reason}): pip install 'setuptools>=77'.")
        return Path(shutil.move(found[0], folder / found[0].name))


def _from_installed(folder: Path) -> Path:
    found = importlib.metadata.distribution("fedsplit")
    name = f"fedsplit-{found.version}-py3-none-any.whl"
    record: list[str] = []
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(found.files or [], key=str):
            top = path.parts[0]
            inside = top == "fedsplit" or top.endswith(".dist-info")
            if not inside or path.name in INSTALLED or "__pycache__" in path.parts:
                continue
            content = Path(str(path.locate())).read_bytes()
            archive.writestr(zipfile.ZipInfo(str(path), DATE), content, zipfile.ZIP_DEFLATED)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f"{path},sha256={digest},{len(content)}")
        info = f"fedsplit-{found.version}.dist-info/RECORD"
        archive.writestr(zipfile.ZipInfo(info, DATE), "\n".join([*record, f"{info},,", ""]), zipfile.ZIP_DEFLATED)
    if not any(line.startswith("fedsplit/__init__.py,") for line in record):
        (folder / name).unlink()
        raise FedsplitError("Cannot pack fedsplit's own wheel: install it with pip, or run this in a checkout.")
    return folder / name
