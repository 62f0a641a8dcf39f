"""Runs that are the same but for their seed, as one; and what tells the others apart."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsplit.config import keys
from fedsplit.report.reading import Run
from fedsplit.types import FedsplitError
from fedsplit.world import is_local

MOST_NAMED = 3
SEEDS = ("seed", "threads", "track")
# Figures of the comparison: name in summary.json, heading, unit, and what a value is divided by.
COMPARED = (
    ("accuracy", "accuracy", "%", 0.01),
    ("personal_accuracy_all", "own models", "%", 0.01),
    ("bytes", "bytes", "MB", 1e6),
    ("client_flops", "client compute", "GFLOP", 1e9),
    ("server_flops", "server compute", "GFLOP", 1e9),
    ("client_peak_bytes", "client memory", "MB", 1e6),
    ("virtual_s", "virtual time", "s", 1.0),
    ("energy_j", "energy", "J", 1.0),
    ("worst_ssim", "worst SSIM", "", 1.0),
)


@dataclass(frozen=True)
class Group:
    """Runs that count as one, with a `label` that tells them from the others."""

    label: str
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """The label with the number of runs."""
        return f"{self.label} (n={len(self.runs)})" if len(self.runs) > 1 else self.label

    def figure(self, name: str) -> tuple[float, float | None, int] | None:
        """Mean, standard deviation (of a sample; None of one) and count of a figure; None where no run has it."""
        values = [value for run in self.runs if (value := measured(run, name)) is not None]
        if not values:
            return None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)


def measured(run: Run, name: str) -> float | None:
    """A figure of `COMPARED` of one run; seconds and joules of devices that are infinitely fast are absent."""
    if name == "bytes":
        ways = [run.figure("bytes_up"), run.figure("bytes_down")]
        return None if None in ways else sum(way or 0.0 for way in ways)
    if name == "worst_ssim":
        value = run.audit.get(name)
        return float(value) if isinstance(value, int | float) else None
    value = run.figure(name)
    return None if name in ("virtual_s", "energy_j") and not value else value


def groups(runs: Sequence[Run], by: Sequence[str] = ()) -> list[Group]:
    """The groups of `runs`: those that differ only in seed and in where they ran, or that agree in the keys `by`.

    Raises:
        FedsplitError: a key of `by` that no run has.
    """
    for key in by:
        if not any(key in run.config for run in runs):
            raise FedsplitError(f"--group: no run has a config key '{key}'; 'fedsplit keys' lists those of today.")
    found: dict[Any, list[Run]] = {}
    for run in runs:
        found.setdefault(_identity(run, by), []).append(run)
    members = list(found.values())
    return [Group(label, tuple(group)) for label, group in zip(_labels(members, by), members, strict=True)]


def as_groups(runs: Run | Group | Sequence[Run | Group]) -> list[Group]:
    """What figures of several runs take: a run, a group, or several of either; runs are put in groups."""
    if isinstance(runs, Run):
        return [Group(runs.name, (runs,))]
    if isinstance(runs, Group):
        return [runs]
    alone = [each for each in runs if isinstance(each, Run)]
    return [each for each in runs if isinstance(each, Group)] + (groups(alone) if alone else [])


def differing(members: Sequence[Sequence[Run]]) -> list[str]:
    """The keys, sorted, whose values differ between groups of runs."""
    names = sorted({name for group in members for name in group[0].config if _counts(name)})
    return [name for name in names if len({key_of(group[0], name) for group in members}) > 1]


def _identity(run: Run, by: Sequence[str]) -> Any:
    if by:
        return tuple(key_of(run, name) for name in by)
    defaults = keys()
    changed = ((name, key_of(run, name)) for name in sorted(run.config) if _counts(name))
    # A key that an earlier version did not have is as good as one at its default.
    return tuple((name, value) for name, value in changed if name not in defaults or value != defaults[name].default)


def _counts(name: str) -> bool:
    return name not in SEEDS and not is_local(name)


def key_of(run: Run, name: str) -> Any:
    """A config key of a run; where its version lacked the key, today's default."""
    known = keys().get(name)
    return run.config.get(name, known.default if known else None)


def _labels(members: Sequence[Sequence[Run]], by: Sequence[str]) -> list[str]:
    """Short, and all different: keys that differ, names where those are many."""
    if len(members) == 1 and not by:
        return [members[0][0].name]
    differ = list(by) or differing(members)
    names = [group[0].name for group in members]
    if len(differ) > MOST_NAMED and len(set(names)) == len(names):
        return names
    labels = [", ".join(f"{name}={brief(key_of(group[0], name))}" for name in differ[:MOST_NAMED]) for group in members]
    if len(set(labels)) < len(labels):
        labels = [f"{name}: {label}" for name, label in zip(names, labels, strict=True)]
    counts: dict[str, int] = {}
    for place, label in enumerate(labels):
        counts[label] = counts.get(label, 0) + 1
        labels[place] = label if counts[label] == 1 else f"{label} #{counts[label]}"
    return labels


def brief(value: Any) -> str:
    """A config value in a label or a table: short."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    text = Path(text).name if text.startswith("/") else text
    return (text if len(text) <= 28 else text[:27] + "…") or "''"


def overview(found: Sequence[Group]) -> list[Mapping[str, Any]]:
    """A row a group for `pandas.DataFrame`: label, n, and mean and standard deviation of every figure there is."""
    rows: list[Mapping[str, Any]] = []
    for group in found:
        row: dict[str, Any] = {"group": group.label, "n": len(group.runs)}
        for name, *_ in COMPARED:
            if figure := group.figure(name):
                row[name], row[f"{name}_std"] = figure[0], figure[1]
        rows.append(row)
    return rows
