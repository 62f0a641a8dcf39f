"""Fixtures of the tests that start processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from probed import processes_in


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Path]:
    """A folder in which no process works in the end."""
    yield tmp_path
    assert processes_in(tmp_path) == []
