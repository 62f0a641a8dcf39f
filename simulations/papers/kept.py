"""Finished runs that are kept: what tables read of each, so that a scoreboard is measured in parts and elsewhere.

`docs/measured/BOARD.jsonl` has a line a run: what decides it (`identity`), the day, commit and machine of its folder,
and its summary. `paper.py BOARD ... --record` adds the lines of what it ran, `--known` takes them instead of running.
A line stands for the code of its commit: who changes what a run computes drops the lines that it makes wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsplit.config import Config, keys
from fedsplit.types import FedsplitError, Scalar
from papers.scoreboard import Run
from papers.work import Summary, deciding

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = Path("docs/measured")

Line = dict[str, Any]


def identity(run: Run) -> dict[str, Any]:
    """What decides the figures of a run, the same on every machine: keys that are not at their defaults.

    Of a path its name alone counts: of a hardened front the keys of its hardening say more, of data `--data` does.
    """
    hardening = None if run.hardening is None else _keys(run.hardening)
    return {"keys": _keys(run.config), "hardening": hardening, "audit": list(run.audit)}


def _keys(config: Config) -> dict[str, Scalar]:
    chosen = deciding(config.values).items()
    return {name: _portable(value) for name, value in chosen if value != keys()[name].default}


def _portable(value: Scalar) -> Scalar:
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def read(board: str) -> list[Line]:
    """The lines of a scoreboard; none where there is no file.

    Raises:
        FedsplitError: a line that is no run.
    """
    file = REPOSITORY / FOLDER / f"{board}.jsonl"
    try:
        lines = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            line["run"], line["identity"], line["summary"]["accuracy"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise FedsplitError(
            f"{file} has a line that is no run ({type(error).__name__}); mend it, or leave out --known."
        ) from None
    return lines


def known(board: str, runs: Iterable[Run]) -> dict[str, Summary]:
    """The summaries of those of `runs` that the scoreboard's file has, by the runs' names.

    Raises:
        FedsplitError: the file cannot be read.
    """
    there = {_text(line["identity"]): line["summary"] for line in read(board)}
    wanted = {run.name: _text(identity(run)) for run in runs} if there else {}
    return {name: there[text] for name, text in wanted.items() if text in there}


def write(board: str, runs: Sequence[Run], summaries: Mapping[str, Summary]) -> int:
    """Put those of `runs` that have a summary into the scoreboard's file, in place of the same run; returns how many.

    Raises:
        FedsplitError: the file that is there cannot be read.
    """
    new = {_text(its): (run, its) for run in runs if run.name in summaries for its in [identity(run)]}
    lines = {_text(line["identity"]): line for line in read(board)}
    for text, (run, its) in new.items():
        lines[text] = {"run": run.name, "identity": its, "summary": dict(summaries[run.name])}
    if new:
        (REPOSITORY / FOLDER).mkdir(parents=True, exist_ok=True)
        ordered = sorted(lines.values(), key=lambda line: (line["run"], _text(line["identity"])))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in ordered)
        (REPOSITORY / FOLDER / f"{board}.jsonl").write_text(text, encoding="utf-8")
    return len(new)


def _text(its: Mapping[str, Any]) -> str:
    return json.dumps(its, sort_keys=True)


__all__ = ["FOLDER", "identity", "known", "read", "write"]
