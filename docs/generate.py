"""The pages that are made when the docs are built: from the registries, the settings, the parser, and the README.

A page of `docs/` says `<!-- made: NAME -->` where the text of `PAGES[NAME]()` belongs. A line that is nothing
but a link to a file of the repository's root, such as `[Use it](../README.md#use-it)`, becomes that section:
the title's is all above the first section, and without a section it is all below the title.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import fedsplit  # noqa: F401  (mends torchvision before timm is imported)
from fedsplit import config
from fedsplit.cli.main import build
from fedsplit.places import PLACES, STUDIES, Place

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("Paper", "Place", "Off", "Deviates")
MARK = re.compile(
    r"^(?:<!-- made: (?P<made>[\w-]+) -->|\[[^\]]+\]\(\.\./(?P<file>\w+\.md)(?:#(?P<anchor>[\w-]+))?\))$", re.MULTILINE
)
# Pages of the repository's root that have one in docs/, too: links to them go there.
HOMES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def fill(text: str) -> str:
    """A page's source with what is made in place of its marks, and links into the repository's root mended.

    Raises:
        KeyError: a mark names nothing.
    """

    def made(found: re.Match[str]) -> str:
        if found["made"]:
            return PAGES[found["made"]]()
        return moved(section((ROOT / found["file"]).read_text(encoding="utf-8"), found["anchor"]))

    return titled(homed(MARK.sub(made, text)))


def section(text: str, anchor: str | None) -> str:
    """A section of a Markdown text by its anchor, its headings a level higher; without one all below the title.

    Raises:
        KeyError: there is no such section.
    """
    title, _, body = text.partition("\n")
    if anchor is None:
        return body
    parts = re.split(r"^## (.+)$", body, flags=re.MULTILINE)
    sections = {slug(name): text for name, text in zip(parts[1::2], parts[2::2], strict=True)}
    sections[slug(title)] = parts[0]
    return re.sub(r"^##(#+ )", r"#\1", sections[anchor], flags=re.MULTILINE)


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip("# ").lower()).replace(" ", "-")


def moved(text: str) -> str:
    """Text of the root for a page in docs/: links to `docs/x.md` lead to `x.md`; notebooks are no pages, and named."""
    return re.sub(r"\[([^\]]+)\]\((notebooks/[^)]+)\)", r"\1: `\2`", text.replace("](docs/", "]("))


def homed(text: str) -> str:
    """Links to the README and its like lead to their pages here."""
    for name, home in HOMES.items():
        text = re.sub(rf"\]\((?:\.\./)?{re.escape(name)}\)", f"]({home})", text)
    return text


def titled(text: str) -> str:
    """Links that show a page's file show its title, which Sphinx puts where there is no text."""
    return re.sub(r"\[(?:docs/)?(\w+\.md)\]\(\1\)", r"[](\1)", text)


def keys() -> str:
    """Every config key, a table a section."""
    sections: dict[str, list[config.Key]] = {}
    for key in config.keys().values():
        sections.setdefault(key.name.partition(".")[0] if "." in key.name else "", []).append(key)
    parts = [f"{len(config.keys())} keys.\n"]
    for name, its in sections.items():
        rows = ((f"`{key.name}`", key.type.__name__, _shown(key.default), span(key), plain(key.help)) for key in its)
        parts += [f"## {name or 'The run'}\n", table(("key", "type", "default", "range", "meaning"), rows)]
    return "\n".join(parts)


def _shown(value: Any) -> str:
    return f"`{config.toml_scalar(value)}`"


def span(key: config.Key) -> str:
    """What a key may be, beside its type."""
    if key.choices is not None:
        return ", ".join(f"`{config.toml_scalar(choice)}`" for choice in key.choices)
    bounds = (("≥", key.low), (">", key.above), ("≤", key.high))
    return ", ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)


def pieces() -> str:
    """Every piece of every place: what it is, its paper, what switches it off, where it departs, its keys."""
    parts = []
    for listed, place in places().items():
        parts.append(f"## `{listed[0] if len(listed) == 1 else place.prefix + '.*'}`\n")
        names = f"{', '.join(f'`{key}`' for key in listed)}: " if len(listed) > 1 else ""
        parts.append(names + ("exactly one of these.\n" if place.single else "a list of these; empty is none.\n"))
        parts += [piece(place, name, cls) for name, cls in place.pieces.items()]
    return "\n".join(parts)


def places() -> dict[tuple[str, ...], Place]:
    """The places by their list keys; keys that name pieces of one registry are together."""
    found: dict[int, list[Place]] = {}
    for place in (*PLACES, *STUDIES):
        found.setdefault(id(place.pieces), []).append(place)
    return {tuple(place.key for place in its): its[0] for its in found.values()}


def piece(place: Place, name: str, cls: type[Any]) -> str:
    """One piece, as a heading, what it is, and a table."""
    what, parts = docstring(inspect.getdoc(cls) or "")
    rows = [(f"**{word}**", plain(text)) for word, text in parts.items()]
    own = [
        (
            f"`{place.prefix}.{name}.{item.name.replace('_', '-')}`",
            f"{_shown(item.default)}: {plain(item.metadata['help'])}",
        )
        for item in dataclasses.fields(cls)
    ]
    rows += [("**Code**", f"`{cls.__module__}.{cls.__name__}`")]
    return f"### {name}\n\n{what}\n\n{table(('', ''), [*rows, *own])}"


def docstring(text: str) -> tuple[str, dict[str, str]]:
    """What a piece's docstring says first, as Markdown, and its parts `Paper:`, `Place:`, `Off:`, `Deviates:`."""
    found = re.split(rf"^({'|'.join(PARTS)}):", text, flags=re.MULTILINE)
    parts = {word: " ".join(said.split()) for word, said in zip(found[1::2], found[2::2], strict=True)}
    return "\n\n".join(plain(paragraph) for paragraph in found[0].strip().split("\n\n")), parts


def plain(text: str) -> str:
    """Text of a docstring as Markdown that shows it as it is; code stays code."""
    halves = " ".join(text.split()).split("`")
    return "`".join(re.sub(r"([*_<>\[\]|])", r"\\\1", half) if n % 2 == 0 else half for n, half in enumerate(halves))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; a bar inside code is escaped, too, since a table would end the cell there."""
    head = tuple(head)
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(barred, row)) + " |" for row in lines) + "\n"


def barred(cell: str) -> str:
    """A cell with every bar escaped, once."""
    return re.sub(r"(?<!\\)\|", r"\\|", cell)


def commands() -> str:
    """The help of `fedsplit` and of every command."""
    parser = build()
    action = next(item for item in parser._actions if isinstance(item, argparse._SubParsersAction))
    every: Mapping[str, argparse.ArgumentParser] = {"": parser, **action.choices}
    return "\n".join(f"## fedsplit {name}".rstrip() + f"\n\n```text\n{said(one)}```\n" for name, one in every.items())


def said(parser: argparse.ArgumentParser) -> str:
    """A parser's help, 100 columns wide wherever it is made."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        return parser.format_help()
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


PAGES: dict[str, Callable[[], str]] = {"keys": keys, "pieces": pieces, "commands": commands}
