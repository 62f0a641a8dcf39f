"""The page of a report: one file that needs nothing beside it, and the pictures as files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsplit.config import keys
from fedsplit.report import sections
from fedsplit.report.groups import COMPARED, MOST_NAMED, Group, brief, differing, groups, key_of, measured
from fedsplit.report.reading import Run
from fedsplit.report.sections import Section
from fedsplit.runs import write
from fedsplit.types import FedsplitError

MOST_DETAILED = 6
MOST_KEYS = 30
HERE = Path(__file__).parent
SPREAD = "Mean ± standard deviation over the runs of a group, where it has several; bytes on the wire are both ways."


@dataclass(frozen=True)
class Detail:
    """One run of several, in full."""

    anchor: str
    title: str
    run: Run
    sections: Sequence[Section]


def build(
    runs: Sequence[Run], folder: Path, by: Sequence[str] = (), tell: Callable[[str], None] = lambda name: None
) -> Path:
    """Draw `runs` and write `folder`/report.html and its pictures; returns the page's path.

    Args:
        runs: of one the page shows everything; several are compared by groups, with one run of each in full.
        folder: made if it is not there; pictures of an earlier report in it are overwritten.
        by: config keys that make the groups; else all that differ but the seed.
        tell: hears the name of each picture before it is drawn.

    Raises:
        FedsplitError: a key that no run has, or a folder that cannot be written.
    """
    found = groups(runs, by)
    details: list[Detail] = []
    if len(runs) == 1:
        shown = sections.of_run(runs[0], tell)
    else:
        shown = sections.compared(found, tell)
        details = [_detail(group, tell) for group in found[:MOST_DETAILED]]
    document = _render(runs, found, shown, details, by)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part in (shown, *(detail.sections for detail in details)):
            sections.write_images(part, folder)
        write(folder / "report.html", document)
    except OSError as error:
        raise FedsplitError(f"Cannot write the report to {folder}: {error.strerror}; give --out DIR.") from None
    return folder / "report.html"


def _detail(group: Group, tell: Callable[[str], None]) -> Detail:
    prefix = f"{sections.slug(group.label)}-"
    return Detail(prefix.rstrip("-"), group.label, group.runs[0], sections.of_run(group.runs[0], tell, prefix))


def _render(
    runs: Sequence[Run], found: Sequence[Group], shown: Sequence[Section], details: Sequence[Detail], by: Sequence[str]
) -> str:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ModuleNotFoundError:
        raise FedsplitError("The page of a report needs jinja2: pip install 'fedsplit[simulation]'.") from None
    place = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    single = runs[0] if len(runs) == 1 else None
    count = f"{len(runs)} runs in {len(found)} group{'s' * (len(found) > 1)}"
    names = {run.name for run in runs}
    title = runs[0].name if len(names) == 1 else count
    return place.get_template("page.html.j2").render(
        title=title,
        lead="" if title == count else f"{count}. ",
        single=single,
        runs=[_line(run) for run in runs],
        tiles=tiles(single) if single else [],
        unfinished=[run for run in runs if not run.finished],
        progress=_progress,
        sections=shown,
        details=details,
        not_in_full=[group.label for group in found[len(details) :]] if details else [],
        groups=found,
        by=by,
        comparison=comparison(found) if not single else {},
        differences=_differences(found) if not single else {},
        settings=_settings(single) if single else {},
        css=(HERE / "page.css").read_text(encoding="utf-8"),
    )


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """The key figures of a run: heading, figure, unit."""
    made = []
    for name, title, unit, by in COMPARED:
        value = measured(run, name)
        if value is not None:
            made.append((title, number(value / by), unit))
    return made


def comparison(found: Sequence[Group]) -> dict[str, Any]:
    """Headings and rows, one a group, of the table: mean ± standard deviation, with units in the headings."""
    there = [entry for entry in COMPARED if any(group.figure(entry[0]) for group in found)]
    headings = ["group", "runs", *(f"{title} ({unit})" if unit else title for _, title, unit, _ in there)]
    rows = []
    for group in found:
        cells = [group.label, str(len(group.runs))]
        for name, _, _, by in there:
            figure = group.figure(name)
            cells.append(spread(figure[0] / by, None if figure[1] is None else figure[1] / by) if figure else "")
        rows.append(cells)
    return {"headings": headings, "rows": rows, "caption": SPREAD}


def number(value: float, like: float | None = None) -> str:
    """Three digits or more, thousands apart; as many decimals as a figure of the size of `like` has."""
    size = abs(value if like is None else like)
    decimals = 3 if size < 1 else 2 if size < 10 else 1 if size < 1000 else 0
    return f"{value:,.{decimals}f}"


def spread(mean: float, deviation: float | None) -> str:
    """`mean ± deviation`."""
    return number(mean) if deviation is None else f"{number(mean)} ± {number(deviation, mean)}"


def _progress(run: Run) -> str:
    return f"{run.rounds.count} of {run.config.get('rounds', '?')} rounds"


def _line(run: Run) -> dict[str, Any]:
    accuracy = measured(run, "accuracy")
    return {
        "name": run.name,
        "folder": run.path.name,
        "seed": run.config.get("seed", ""),
        "rounds": _progress(run),
        "state": "finished" if run.finished else "not finished",
        "accuracy": "" if accuracy is None else f"{100 * accuracy:.1f}",
        "about": run.about,
    }


def _differences(found: Sequence[Group]) -> dict[str, Any]:
    """The keys in which groups differ, a row each; none where the labels say them all."""
    names = differing([group.runs for group in found])
    if len(names) <= MOST_NAMED:
        return {}
    rows = [[name, *(brief(key_of(group.runs[0], name)) for group in found)] for name in names[:MOST_KEYS]]
    more = f" The first {MOST_KEYS} of {len(names)} keys." if len(names) > MOST_KEYS else ""
    caption = f"Config keys in which the first runs of the groups differ. Data: config.toml.{more}"
    return {"headings": ["key", *(group.label for group in found)], "rows": rows, "caption": caption}


def _settings(run: Run) -> Mapping[str, Any]:
    """The config: keys that are not at today's default first, then all others, and those that today knows no more."""
    known = keys()
    rows = [(name, _shown(value)) for name, value in run.config.items()]
    changed = [row for row in rows if row[0] not in known or run.config[row[0]] != known[row[0]].default]
    strange = [name for name, _ in rows if name not in known]
    return {"changed": sorted(changed), "all": sorted(rows), "strange": strange}


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"
