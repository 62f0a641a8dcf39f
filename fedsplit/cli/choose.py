"""`fedsplit plan --choose`: what was weighed for every kind of device, and the config that was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsplit.config import Config, keys, resolve, to_toml
from fedsplit.runs import write
from fedsplit.types import FedsplitError, Scalar
from fedsplit.weigh import MEASURES, Search, settled

FLOOR = "front"


def document(config: Config, tries: Sequence[str], limits: Sequence[str], target: str | None) -> dict[str, Any]:
    """What `--try` and `--limit` ask for: `chosen` keys, `kinds` of devices, and what was `weighed`.

    With `target` the chosen config is written there.

    Raises:
        FedsplitError: a malformed or unknown entry, nothing within the limits, or a file that cannot be written.
    """
    bounds = _limits(limits)
    search = Search(config, _tries(config, tries, bounds.pop(FLOOR, 0)), bounds)
    chosen = search.best()
    made = settled(config, chosen)
    if target:
        _write(made, Path(target))
    return {
        "name": config.name,
        "chosen": {key: value for key, value in made.values.items() if value != config.values[key]},
        "kinds": {kind: {**chosen.shared, **own} for kind, own in chosen.own.items()},
        "weighed": [
            {
                "kind": try_.kind, **try_.shared, **try_.own, **try_.costs, "breaks": list(try_.breaks),
                "chosen": try_.shared == chosen.shared and try_.own == chosen.own[try_.kind],
            }
            for try_ in chosen.weighed
        ],
        "written": target or "",
    }  # fmt: skip


def show(found: dict[str, Any], console: Console | None = None) -> None:
    """Print what `document` gave."""
    console = console or Console()
    tried = list(next(iter(found["kinds"].values())))
    table = Table(title="A client and round on each kind of device; * is chosen", title_justify="left")
    table.add_column("device", no_wrap=True)
    table.add_column("values")
    for title in ("s", "MB", "J", "memory MB"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("too much of")
    for row in found["weighed"]:
        values = ", ".join(f"{key.rpartition('.')[2]} {row[key]}" for key in tried if row[key] != "")
        figures = (row["seconds"], row["bytes"] / 1e6, row["joules"], row["memory_bytes"] / 1e6)
        broken = ", ".join(name.removesuffix("_bytes") for name in row["breaks"])
        mark = "*" if row["chosen"] else " "
        table.add_row(f"{mark} {row['kind']}", values, *(f"{figure:,.3g}" for figure in figures), broken)
    console.print(table)
    for key, value in found["chosen"].items():
        console.print(f"{key} = {value!r}", highlight=False, soft_wrap=True)
    if found["written"]:
        console.print(f"Run it with: fedsplit run --config {found['written']}", highlight=False, soft_wrap=True)


def _tries(config: Config, entries: Sequence[str], floor: float) -> dict[str, list[Scalar]]:
    """Keys and their values in order; without entries a shallower cut and smaller batches than the config's."""
    halves = [max(1, config.local.batch_size // divisor) for divisor in (1, 2, 4)]
    tries: dict[str, list[Scalar]] = {
        "cut.front": list(range(config.cut.front, -1, -1)),
        "local.batch-size": list(dict.fromkeys(halves)),
    }
    tries = {} if entries else tries
    for entry in entries:
        key, equals, text = entry.partition("=")
        if not equals or key not in keys():
            raise FedsplitError(f"--try {entry}: write KEY=VALUE|VALUE with a config key, e.g. cut.front=2|1|0.")
        tries[key] = [_value(key, value.strip()) for value in text.split("|")]
    if "cut.front" in tries:
        tries["cut.front"] = [value for value in tries["cut.front"] if float(value) >= floor]
    elif floor > config.cut.front:
        tries["cut.front"] = [int(floor)]
    return tries


def _value(key: str, text: str) -> Scalar:
    kind = keys()[key].type
    try:
        value: Scalar = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise FedsplitError(f"--try {key}: '{text}' is not {kind.__name__}.") from None
    resolve({key: value})
    return value


def _limits(entries: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for entry in entries:
        name, _, text = entry.partition("=")
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = -1.0
        if name not in (*MEASURES, FLOOR) or found[name] < 0:
            raise FedsplitError(
                f"--limit {entry}: write NAME=NUMBER with one of {', '.join((*MEASURES, FLOOR))}, e.g. seconds=60."
            )
    return found


def _write(config: Config, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, to_toml(config.values))
    except OSError as error:
        raise FedsplitError(f"Cannot write {path}: {error.strerror}.") from None
