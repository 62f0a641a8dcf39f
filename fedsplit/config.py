"""A resolved configuration: the core's settings, the pieces' keys, and their checks.

Values come from defaults, then TOML files, then `key=value` pairs, later ones winning. Every key is
dotted and kebab-case, every value a scalar; an unknown key, a wrong type, or a value out of range
is one `FedsplitError`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from fedsplit import plugins
from fedsplit.places import PLACES, STUDIES, Place
from fedsplit.settings import Settings
from fedsplit.types import FedsplitError, Scalar, split_names

T = TypeVar("T")


@dataclass(frozen=True)
class Key:
    """A config key: `type` is one of int, float, bool, str; `low` and `high` are inclusive, `above` is not."""

    name: str
    type: type[Scalar]
    default: Scalar
    help: str
    low: float | None = None
    above: float | None = None
    high: float | None = None
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Config(Settings):
    """Typed settings plus `values`, every key with its value, pieces' keys included."""

    values: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)

    def names(self, key: str) -> tuple[str, ...]:
        """The comma-separated names of a list key."""
        return split_names(str(self.values[key]))

    def pieces(self, key: str) -> list[Any]:
        """The pieces that list key `key` names, built from their own keys, in order."""
        place = next(place for place in (*PLACES, *STUDIES) if place.key == key)
        return [self._build(place, name) for name in self.names(key)]

    def piece(self, key: str) -> Any:
        """The one piece that a single-valued key names."""
        return self.pieces(key)[0]

    def _build(self, place: Place, name: str) -> Any:
        cls = place.pieces[name]
        prefix = f"{place.prefix}.{name}"
        fields = {f.name: self.values[f"{prefix}.{_kebab(f.name)}"] for f in dataclasses.fields(cls)}
        return cls(**fields)

    def replace(self, **changes: Scalar) -> Config:
        """A copy with other values; write `devices__per_round` for `devices.per-round`."""
        named = {_kebab(name.replace("__", ".")): value for name, value in changes.items()}
        return resolve({**self.values, **named})


@cache
def keys() -> Mapping[str, Key]:
    """Every key, core first, then the pieces', in the order of their definition.

    Raises:
        FedsplitError: pieces of `FEDSPLIT_PIECES` that cannot be had.
    """
    plugins.from_environment()
    found = {key.name: key for key in _keys_of(Settings, "")}
    for place in (*PLACES, *STUDIES):
        for name, cls in place.pieces.items():
            for key in _keys_of(cls, f"{place.prefix}.{name}."):
                found.setdefault(key.name, key)
    return found


def resolve(values: Mapping[str, Any]) -> Config:
    """A checked `Config` from dotted keys.

    Raises:
        FedsplitError: an unknown key, a wrong type, or a value out of range.
    """
    checked = _checked(keys(), values)
    config = Config(**_section(Settings, "", checked), values=checked)
    _check_names(config)
    return config


def load(files: Iterable[str | Path] = (), pairs: Iterable[str] = ()) -> Config:
    """A `Config` from TOML files and `key=value` pairs, later ones winning.

    Raises:
        FedsplitError: also for a missing or malformed file or pair.
    """
    return resolve(_read(keys(), files, pairs))


def read_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """The values of `key=value` pairs by the types of their keys; checked when they are resolved.

    Raises:
        FedsplitError: what is no pair.
    """
    return _read(keys(), (), pairs)


def load_as(kind: type[T], files: Iterable[str | Path] = (), pairs: Iterable[str] = ()) -> T:
    """Like `load`, for another dataclass of knobs (`fedsplit pretrain` has its own keys)."""
    known = {key.name: key for key in _keys_of(kind, "")}
    return kind(**_section(kind, "", _checked(known, _read(known, files, pairs))))


def read_toml(path: Path) -> dict[str, Any]:
    """The dotted keys of a TOML file; tables nest or are dotted, as Flower reads them."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FedsplitError(f"Cannot read the config file {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FedsplitError(f"{path} is not valid TOML: {error}.") from None
    return dict(flatten(document))


def to_toml(values: Mapping[str, Scalar]) -> str:
    """The keys as TOML, one table a section, top-level keys first."""
    lines: list[str] = []
    section = ""
    for name in sorted(values, key=lambda name: ("." in name, name.rpartition(".")[0], name)):
        table, _, leaf = name.rpartition(".")
        if table != section:
            lines += ["", f"[{table}]"]
            section = table
        lines.append(f"{leaf} = {toml_scalar(values[name])}")
    return "\n".join(lines).strip() + "\n"


def toml_scalar(value: Scalar) -> str:
    """A scalar as TOML text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML's escapes are JSON's
    return repr(value)


def _checked(known: Mapping[str, Key], values: Mapping[str, Any]) -> dict[str, Scalar]:
    for name in values:
        if name not in known:
            raise FedsplitError(f"Unknown config key '{name}'{_hint(name, known)}; 'fedsplit keys' lists them all.")
    return {name: _check(key, values.get(name, key.default)) for name, key in known.items()}


def _read(known: Mapping[str, Key], files: Iterable[str | Path], pairs: Iterable[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for file in files:
        values.update(read_toml(Path(file)))
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise FedsplitError(f"'{pair}' is not key=value, e.g. optimizer.lr=0.01.")
        values[name.strip()] = _parse(known.get(name.strip()), text.strip())
    return values


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _keys_of(cls: type[Any], prefix: str) -> Iterator[Key]:
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            yield from _keys_of(kind, f"{prefix}{_kebab(item.name)}.")  # type: ignore[arg-type]
        elif item.name != "values":
            name = f"{prefix}{_kebab(item.name)}"
            yield Key(name, kind, item.default, **item.metadata)  # type: ignore[arg-type]


def _section(cls: type[Any], prefix: str, values: Mapping[str, Scalar]) -> dict[str, Any]:
    """The fields of dataclass `cls` from dotted values, sections built."""
    hints = get_type_hints(cls)
    made: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        name = f"{prefix}{_kebab(item.name)}"
        kind: type[Any] = hints[item.name]
        made[item.name] = kind(**_section(kind, f"{name}.", values)) if dataclasses.is_dataclass(kind) else values[name]
    return made


def _check(key: Key, value: Any) -> Scalar:
    if key.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not key.type:
        raise FedsplitError(f"{key.name} must be {_word(key.type)}, got {value!r}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise FedsplitError(f"{key.name} must be finite, got {value}.")
    number = value if isinstance(value, int | float) else 0.0
    if key.low is not None and number < key.low:
        raise FedsplitError(f"{key.name} must be at least {key.low:g}, got {value}.")
    if key.above is not None and number <= key.above:
        raise FedsplitError(f"{key.name} must be more than {key.above:g}, got {value}.")
    if key.high is not None and number > key.high:
        raise FedsplitError(f"{key.name} must be at most {key.high:g}, got {value}.")
    if key.choices is not None and value not in key.choices:
        raise FedsplitError(f"{key.name} must be one of {', '.join(map(repr, key.choices))}; got {value!r}.")
    checked: Scalar = value
    return checked


def _check_names(config: Config) -> None:
    for place in (*PLACES, *STUDIES):
        names = config.names(place.key)
        for name in names:
            if name not in place.pieces:
                known = ", ".join(place.pieces) or "none yet"
                raise FedsplitError(f"{place.key} names no piece '{name}'{_hint(name, place.pieces)}; known: {known}.")
            if names.count(name) > 1:
                raise FedsplitError(f"{place.key} names '{name}' more than once; name it once.")
            try:
                config._build(place, name)
            except FedsplitError as error:  # values that do not go together; the piece does not know its name
                raise FedsplitError(f"{place.prefix}.{name}: {error}") from None
        if place.single and len(names) != 1:
            raise FedsplitError(f"{place.key} must name exactly one of: {', '.join(place.pieces)}.")


def _parse(key: Key | None, text: str) -> Any:
    """A command-line value by the type of its key; left as text where it does not fit."""
    if key is None or key.type is str:
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text
    if key.type is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return int(text) if key.type is int else float(text)
    except ValueError:
        return text


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of nested tables, and their values."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _word(kind: type[Scalar]) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
