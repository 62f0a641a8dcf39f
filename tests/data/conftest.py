from __future__ import annotations

from pathlib import Path

import pytest
from picture_files import pictures, write_split


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a cache of its own."""
    home = tmp_path / "cache-home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of 20 training and 6 test images, 8 x 8, three named classes."""
    path = tmp_path / "set"
    write_split(path / "train.parquet", pictures(20), [i % 3 for i in range(20)], ["ant", "bee", "cow"])
    write_split(path / "test.parquet", pictures(6, seed=1), [i % 3 for i in range(6)], ["ant", "bee", "cow"])
    return path
