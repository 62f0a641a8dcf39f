"""The figures of runs, for the page of `fedsplit report` and for notebooks.

Each takes a `Run`, or for comparisons a run, a `Group` or a list of either, and returns a `Picture` (matplotlib's
figure, without pyplot). It raises `fedsplit.report.Absent`, with a sentence, where it does not apply to a run.
"""

from __future__ import annotations

from fedsplit.report.figures.body import choices, plans
from fedsplit.report.figures.crossing import crossing
from fedsplit.report.figures.data import classes, partition, personal
from fedsplit.report.figures.fleet import gantt, phases
from fedsplit.report.figures.privacy import audit, reconstructions
from fedsplit.report.figures.tradeoff import tradeoff
from fedsplit.report.figures.training import accuracy, compare, ledger

__all__ = [
    "accuracy",
    "audit",
    "choices",
    "classes",
    "compare",
    "crossing",
    "gantt",
    "ledger",
    "partition",
    "personal",
    "phases",
    "plans",
    "reconstructions",
    "tradeoff",
]
