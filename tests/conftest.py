"""What every test shares: no network, one thread, the same random start, and a run must prove something."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

# Before anything imports them: each of these reads its environment once.
os.environ.update(
    {
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
)

import hypothesis
import numpy as np
import pytest
import torch

import fedsplit  # noqa: F401  (mends torchvision before a test imports timm)

torch.set_num_threads(1)

# Machines differ in speed, and a failure must come again: no deadline, the same examples every time.
hypothesis.settings.register_profile("fedsplit", deadline=None, derandomize=True, database=None, max_examples=50)
hypothesis.settings.load_profile("fedsplit")


@pytest.fixture(autouse=True)
def same_start() -> None:
    """No test depends on which ran before it: global streams and the thread count start the same."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's own runs lay their two pictures out but do not render them, a third of a small run's time.

    All else is rendered, and so are these in runs of a module's fixtures and in processes of their own, and by
    test_data_partitions.py in every size.
    """
    from matplotlib.figure import Figure

    render = Figure.savefig

    def savefig(figure: Figure, path: str | Path, **options: Any) -> None:
        if Path(path).name in ("partition.png", "accuracy.png"):
            Path(path).write_bytes(b"not rendered")
        else:
            render(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds pyproject.toml."""
    return Path(__file__).resolve().parents[1]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run in which nothing passed proves nothing: it fails, as one that collects nothing does."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    worker = hasattr(session.config, "workerinput")
    if worker or reporter is None or session.config.option.collectonly:
        return
    if exitstatus == pytest.ExitCode.OK and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: workers that take whole files then end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
