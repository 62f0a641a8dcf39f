"""How many inputs the fuzz tests tried stands in the report."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "inputs" and report.when == "call":
                terminalreporter.write_line(f"{report.nodeid}: {value} inputs tried")
