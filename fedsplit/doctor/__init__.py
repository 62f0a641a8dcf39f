"""What this machine has, what fedsplit needs, and how to mend the difference.

Versions come from the packages' metadata and the ranges from fedsplit's own, so that a check takes
no import: torch is the only heavy one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

from fedsplit.doctor import machine, packages
from fedsplit.doctor.check import Check

# In the order in which one would mend them.
GROUPS: tuple[Callable[[], Iterator[Check]], ...] = (
    packages.python,
    packages.packages,
    packages.torchvision,
    packages.weights,
    machine.processor,
    machine.memory,
    machine.shared_memory,
    machine.disk,
    machine.cuda,
    machine.determinism,
    machine.flower,
    machine.ray,
)


def checks(groups: Iterable[Callable[[], Iterator[Check]]] | None = None) -> list[Check]:
    """Every check of `groups`, in their order; without them, of `GROUPS`. Raises nothing."""
    found: list[Check] = []
    for group in GROUPS if groups is None else groups:
        name = group.__name__.replace("_", " ")
        try:
            found += group()
        except ImportError as error:
            found.append(Check(name, "error", f"cannot import: {error}", "Install or repair the package it names."))
        except Exception as error:  # a check that fails is a finding; the others still count
            found.append(
                Check(name, "error", f"{type(error).__name__}: {error}", "The check itself failed: report it.")
            )
    return found


def report(found: Iterable[Check]) -> str:
    """The checks as a plain text table, each mend under its row, and a closing count."""
    rows = list(found)
    width = max((len(row.name) for row in rows), default=0)
    lines: list[str] = []
    for row in rows:
        lines.append(f"{row.level:<7}  {row.name:<{width}}  {row.found}")
        if row.mend:
            lines.append(f"{'':<7}  {'':<{width}}  -> {row.mend}")
    errors, warnings = (sum(row.level == level for row in rows) for level in ("error", "warning"))
    return "\n".join([*lines, "", f"{len(rows)} checks, errors: {errors}, warnings: {warnings}"])


def as_json(found: Iterable[Check]) -> str:
    """The checks as one JSON document: `ok` (no error among them) and `checks`."""
    rows = list(found)
    listed = [{**asdict(row), "ok": row.ok} for row in rows]
    return json.dumps({"ok": all(row.level != "error" for row in rows), "checks": listed}, indent=2)
