"""`fedsplit audit` on a terminal."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedsplit import audit
from fedsplit.audit.report import COLUMNS, GATES, UNRECOGNISABLE
from fedsplit.types import FedsplitError

FAILED = 3
WIDTH = 120  # of what is no terminal


def carry_out(options: argparse.Namespace) -> int:
    """Audit what the command line names; returns 3 when a gate fails.

    Raises:
        FedsplitError: whatever is wrong, before an attack begins.
    """
    gates = {name: getattr(options, name) for name in GATES if getattr(options, name) is not None}
    if options.run and options.config:
        raise FedsplitError("Give a run folder or --config, not both.")
    if options.run:
        target = audit.of_run(options.run, options.suite, options.set)
        folder = Path(options.out or Path(options.run) / "audit")
    elif options.config:
        if not options.out:
            raise FedsplitError("An audit of a config needs a folder of its own; give --out DIR.")
        target = audit.of_config(options.config, options.suite, options.set)
        folder = Path(options.out)
    else:
        raise FedsplitError("Name what is audited: a run folder, or --config F.toml with --out DIR.")
    strict = any(pair.partition("=")[0].strip() == "audit.attacks" for pair in options.set)
    width = None if sys.stdout.isatty() else WIDTH
    console = Console(stderr=bool(options.json), width=width)
    with Follow(console) as watch:
        found = audit.run(target, folder.expanduser(), gates, watch, strict)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        show(found, folder, console)
    return FAILED if found["passed"] is False else 0


class Follow:
    """A bar of the attack at hand; on what is no terminal a line an attack."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        self._bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
        self._task: Any = None
        self._name, self._begun = "", 0

    def __enter__(self) -> Follow:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def attack(self, name: str, seed: int, total: int) -> None:
        """Name it."""
        self._begun += 1
        self._name = f"{self._begun} of {total}: {name}, seed {seed}"
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(self._name, total=None)
        if not self.console.is_terminal:
            self.console.print(self._name, highlight=False)

    def step(self, what: str, done: int, total: int) -> None:
        """One step further."""
        self._bar.update(self._task, description=f"{self._name} ({what})", completed=done, total=total)

    def note(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(f"note: {text}", highlight=False, soft_wrap=True)


def show(found: dict[str, Any], folder: Path, console: Console) -> None:
    """Print the table, what the server saw, and the verdict."""
    console.print(table(found))
    for text in (*sight(found), *verdict(found), f"Written to {folder}: audit.json, audit.csv, images.csv, audit.png"):
        console.print(text, highlight=False, soft_wrap=True)


def table(found: dict[str, Any]) -> Table:
    """The attacks, strongest first, beside what one may guess without seeing anything."""
    rows = sorted(found["attacks"], key=lambda row: -row.get("ssim", -1.0))
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    shown = Table(title="What an attacker makes of it (arrows point to what is safer)")
    for name in ("attack", "seeds", *(COLUMNS[name] for name in names), "95 % CI of SSIM", "steps", "s"):
        shown.add_column(name, justify="left" if name == "attack" else "right", no_wrap=True)
    for row in [*rows, {"attack": "mean image", **found["mean_image"]}]:
        cells = [f"{row[name]:.3f}" if name in row else "" for name in names]
        interval = f"{row['ssim_ci_low']:.3f} to {row['ssim_ci_high']:.3f}" if "ssim_ci_low" in row else ""
        spent = [f"{row[name]:.0f}" if name in row else "" for name in ("steps", "seconds")]
        shown.add_row(row["attack"], str(row.get("seeds", "")), *cells, interval, *spent)
    return shown


def sight(found: dict[str, Any]) -> list[str]:
    """The exposure in a few lines."""
    seen, sizes = found["exposure"], found["exposure"]["bytes_per_upload"]
    tensors = ", ".join(f"{name} {tuple(shape)}" for name, shape in seen["tensors"].items())
    lines = [f"The server sees of a sample: {tensors}; {sum(sizes.values()):,.0f} bytes an upload."]
    if seen["uploads_per_sample_mean"] is not None:
        mean, most = seen["uploads_per_sample_mean"], seen["uploads_per_sample_most"]
        lines.append(
            f"In this run a sample went up {mean:.1f} times in the mean (those of one device {most:.1f} times), in up "
            f"to {seen['rounds_most']} rounds; {seen['devices_seen']} of {seen['devices']} devices took part."
        )
    share = 100 * found["clean_identified"]
    lines.append(f"The classifier that judges reconstructions recognises {share:.0f} % of the originals.")
    return lines


def verdict(found: dict[str, Any]) -> list[str]:
    """What the gates say, or how the worst SSIM stands to the usual bound."""
    if found["gates"]:
        words = {True: "passed", False: "FAILED"}
        return [
            f"{words[gate['passed']]}: {gate['what']} is {gate['value']:.3f}, bound {gate['bound']:g}"
            for gate in found["gates"]
        ]
    if found["worst_ssim"] is None:
        return []
    side = "below" if found["unrecognisable"] else "not below"
    return [
        f"Worst: {found['worst_attack']}, mean SSIM {found['worst_ssim']:.3f}, {side} {UNRECOGNISABLE} "
        "(the bound of He et al., ACSAC 2019). A stronger attacker may find more."
    ]
