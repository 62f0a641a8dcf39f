"""Runs to look at: read run folders, group them by what differs, draw them, and make one page of it.

    from fedsplit import report
    run = report.load("runs/20260101-120000-demo")
    run.config["cut.front"], run.summary["accuracy"], run.rounds["accuracy"], run.clients.rows()
    report.figures.accuracy(run, against="bytes")
    report.figures.accuracy(report.groups(report.load_all(["studies/cut"])))

It needs matplotlib (`pip install 'fedsplit[simulation]'`), and jinja2 for the page.
"""

from __future__ import annotations

from fedsplit.types import FedsplitError

try:
    from fedsplit.report import figures
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "matplotlib":
        raise
    raise FedsplitError("Reports need matplotlib and jinja2: pip install 'fedsplit[simulation]'.") from error
from fedsplit.report.groups import Group, groups, overview
from fedsplit.report.reading import Absent, Run, load, load_all
from fedsplit.report.style import Picture
from fedsplit.report.table import Table, read_table

__all__ = [
    "Absent",
    "Group",
    "Picture",
    "Run",
    "Table",
    "figures",
    "groups",
    "load",
    "load_all",
    "overview",
    "read_table",
]
