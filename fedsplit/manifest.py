"""Flower's table of config keys in pyproject.toml, written from the settings and the pieces.

`flwr run --run-config` accepts only keys that stand in that table. `python -m fedsplit.manifest`
writes it anew; with `--check` it changes nothing and exits 1 where the table is stale.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from fedsplit import config
from fedsplit.types import FedsplitError

BEGIN = "# >>> keys"
END = "# <<< keys"
TABLE = "tool.flwr.app.config"


def block(keys: Iterable[config.Key]) -> str:
    """The keys as TOML tables, one a section, each key with its help beside it."""
    sections: dict[str, list[config.Key]] = {"": []}
    for key in keys:
        sections.setdefault(key.name.rpartition(".")[0], []).append(key)
    tables = []
    for section in sections:
        rows = [f"[{TABLE}.{section}]" if section else f"[{TABLE}]"]
        rows += [
            f"{key.name.rpartition('.')[2]} = {config.toml_scalar(key.default)} # {_one_line(key.help)}"
            for key in sections[section]
        ]
        tables.append("\n".join(rows))
    return "\n\n".join(tables)


def renew(text: str, keys: Iterable[config.Key]) -> str:
    """The text of a pyproject.toml with the block between the two markers written anew.

    Raises:
        FedsplitError: the markers are missing.
    """
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith(BEGIN)]
    ends = [number for number, line in enumerate(lines) if line.startswith(END)]
    if len(starts) != 1 or len(ends) != 1 or ends[0] < starts[0]:
        raise FedsplitError(f"pyproject.toml needs one line '{BEGIN} ...' and, below it, one line '{END}'.")
    return "\n".join([*lines[: starts[0] + 1], block(keys), *lines[ends[0] :]]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fedsplit.manifest", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the table is stale")
    parser.add_argument("--file", type=Path, default=Path(__file__).resolve().parents[1] / "pyproject.toml")
    options = parser.parse_args(arguments)
    try:
        old = options.file.read_text(encoding="utf-8")
        new = renew(old, config.keys().values())
    except (OSError, FedsplitError) as error:
        print(f"fedsplit.manifest: {error}", file=sys.stderr)
        return 1
    if new == old:
        return 0
    if options.check:
        print(f"{options.file.name} is stale: run `python -m fedsplit.manifest`.", file=sys.stderr)
        return 1
    options.file.write_text(new, encoding="utf-8")
    print(f"{options.file.name} written.")
    return 0


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
