"""The scoreboard that is kept: what was measured of every claim, and the tables that README and docs make of it.

`docs/scoreboard.json` has an entry for every claim of `papers.PAPERS`, on every partition on which it is judged and
every data set that was recorded; of those that nobody has recorded yet, one that says so. The tables between
`<!-- scoreboard -->` and `<!-- end of scoreboard -->` in README.md and docs/scoreboard.md are made of that file alone.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from papers import PAPERS
from papers.figures import claimed_on
from papers.render import NOT_RUN, Entry, placed, tables
from papers.scoreboard import Claim, Request, Run, Scoreboard, main_cells

REPOSITORY = Path(__file__).resolve().parents[2]
FILE = Path("docs/scoreboard.json")


def entries(
    board: Scoreboard,
    asked: Request,
    runs: Sequence[Run],
    claims: Iterable[Mapping[str, Any]],
    summaries: Mapping[str, Mapping[str, Any]],
) -> list[Entry]:
    """An entry a judged claim, as `papers.figures.judge` has it; date and commit are those of its runs."""
    made = []
    for claim in claims:
        its = next(c for c in board.claims if c.text == claim["claim"])
        behind = [r for r in runs if r.partition == claim["partition"] and r.arm in (its.arm, its.against)]
        date, commit = when(summaries[run.name] for run in behind)
        made.append(
            _entry(board, its, claim["partition"])
            | {name: claim[name] for name in ("ours", "ours_std", "seeds", "holds", "verdict")}
            | {"data": data_word(asked), "scale": scale_words(behind[0], asked), "command": command(board, asked)}
            | {"date": date, "commit": commit}
        )
    return made


def _entry(board: Scoreboard, claim: Claim, partition: str) -> Entry:
    """The claim itself, not measured."""
    bounds = (("≥", claim.low), (">", claim.above), ("≤", claim.high))
    relation, published = next((sign, limit) for sign, limit in bounds if limit is not None)
    return {
        "method": board.name,
        "paper": board.title,
        "claim": claim.text,
        "partition": board.partition(partition).title,
        "source": claim.source,
        "figure": claim.figure,
        "relation": relation,
        "claimed": published,
        "published_for": claim.published_for,
        "ours": None,
        "ours_std": None,
        "seeds": 0,
        "holds": None,
        "verdict": NOT_RUN,
        "data": "",
        "scale": "",
        "command": f"python simulations/paper.py {board.name} --data FOLDER",
        "date": "",
        "commit": "",
    }


def when(summaries: Iterable[Mapping[str, Any]]) -> tuple[str, str]:
    """The UTC day on which the last of the runs ended, and the commits that their run folders named."""
    its = list(summaries)
    commits = dict.fromkeys(_short(summary["commit"]) for summary in its if summary["commit"])
    return max((summary["date"] for summary in its), default=""), ", ".join(
        name for name in commits if f"{name}+" not in commits
    )


def _short(commit: str) -> str:
    return commit[:7] + ("+" if commit.endswith("+") else "")


def data_word(asked: Request) -> str:
    """The name of the data: that of the folder, or digits."""
    return Path(asked.data).name if asked.data else "digits"


def scale_words(run: Run, asked: Request) -> str:
    """How large the runs are."""
    config = run.config
    images = f"{config.data.limit:,} images, " if config.data.limit else ""
    classes = f"{config.data.classes} classes, " if config.data.classes else ""
    a_round = config.devices.per_round or "all"
    return f"{asked.model}, {classes}{images}{config.devices.count} devices, {a_round} a round, {config.rounds} rounds"


def command(board: Scoreboard, asked: Request) -> str:
    """The command of the table, without what changes no figure; folders by their names alone."""
    words = ["python", "simulations/paper.py", board.name]
    words += ["--data", data_word(asked)] if asked.data else []
    words += ["--only", asked.only] if asked.only else []
    words += ["--arms", ",".join(asked.arms)] if asked.arms else []
    words += ["--seeds", str(asked.seeds)] if asked.seeds != 3 else []
    words += ["--model", asked.model] if asked.model != "fedsplit_micro" else []
    for pair in asked.pairs:
        key, _, value = pair.partition("=")
        words += ["--set", f"{key}={Path(value).name if value.startswith('/') else value}"]
    return shlex.join(words)


def merged(kept: Iterable[Entry], new: Iterable[Entry]) -> list[Entry]:
    """The entries with new ones in place of those of the same claim, partition and data; exactly the boards' claims.

    What no board claims any more is gone; a claim that has no measured entry has one that says so.
    """
    found: dict[tuple[str, str, str], dict[str, Entry]] = {}
    for entry in (*kept, *new):
        if entry["verdict"] != NOT_RUN:
            found.setdefault((entry["method"], entry["claim"], entry["partition"]), {})[entry["data"]] = entry
    every: list[Entry] = []
    for board in PAPERS.values():
        cells = main_cells(board, Request(Path()))
        for claim in board.claims:
            for partition in claimed_on(claim, cells):
                blank = _entry(board, claim, partition)
                its = found.get((board.name, claim.text, blank["partition"]), {}).values()
                # What the claim says is the board's, also where it was recorded before the board changed.
                said = {name: blank[name] for name in ("paper", "source", "published_for")}
                every += [entry | said for entry in its if _same_bound(entry, blank)] or [blank]
    return every


def _same_bound(entry: Entry, blank: Entry) -> bool:
    return all(entry[name] == blank[name] for name in ("figure", "relation", "claimed"))


def read(root: Path = REPOSITORY) -> list[Entry]:
    """The entries of the checked-in file; none where there is no file."""
    file = root / FILE
    return list(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else []


def write(new: Iterable[Entry] = (), root: Path = REPOSITORY) -> None:
    """Put new entries into the file, and write the tables of all pages anew.

    Raises:
        FedsplitError: a page has no place for its table.
    """
    every = merged(read(root), new)
    pages = {name: placed((root / name).read_text(encoding="utf-8"), table, name) for name, table in tables(every)}
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in every)
    (root / FILE).write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    for name, text in pages.items():
        (root / name).write_text(text, encoding="utf-8")
