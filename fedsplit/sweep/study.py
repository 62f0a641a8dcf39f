"""A study file: which configs, keys, arms and seeds a sweep runs."""

from __future__ import annotations

import difflib
import hashlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from fedsplit.audit import suites
from fedsplit.config import Config, flatten, read_pairs, read_toml, resolve, toml_scalar
from fedsplit.types import FedsplitError, Scalar
from fedsplit.world import DEFAULT_DEVICES

KEYS = ("name", "config", "seeds", "audit", "set", "grid", "arms")
ARM_KEYS = ("name", "config", "set")
# Keys that a sweep sets itself, and what to write instead.
OWN = {
    "seed": "write seeds = N, or a list of seeds, at the top of the file",
    "out": "give --out DIR to fedsplit sweep",
    "resume": "the same command goes on with what is there",
    "name": "write name = ... at the top of the file",
    "engine.workers": "give --jobs N to fedsplit sweep, which runs so many at once, a process each",
}
LONGEST = 120  # characters of a folder's name; file systems end at 255

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Arm:
    """A named set of keys, crossed with the grid; the name of a study's only arm may be empty."""

    name: str
    files: tuple[Path, ...]
    values: Values


@dataclass(frozen=True)
class Run:
    """One run of a sweep: a point of arms and grid with a seed.

    `name` is that of its folder, `point` what it is called, its arm (if there are arms) and its values of the grid's
    keys. `audit` is a suite or empty, `audit_pairs` what the study itself says of the audit.
    """

    name: str
    point: Mapping[str, Scalar]
    seed: int
    config: Config
    audit: str = ""
    audit_pairs: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Its folder."""
        return Path(self.config.out)


@dataclass(frozen=True)
class Study:
    """A study file, read: `files`, then `fixed`, then an arm's files and values, then a point of `grid`; later win."""

    name: str
    text: str
    files: tuple[Path, ...]
    fixed: Values
    arms: tuple[Arm, ...]
    grid: Mapping[str, tuple[Any, ...]]
    seeds: tuple[int, ...]
    audit: str

    def runs(self, out: Path) -> list[Run]:
        """Every run, seed by seed, so that an early stop leaves whole grids of fewer seeds.

        Raises:
            FedsplitError: a key or a value that no run can have, with the point that has it.
        """
        points = [(arm, dict(zip(self.grid, values, strict=True))) for arm, values in self._cells()]
        wanted = [self._run(out, arm, values, seed) for seed in self.seeds for arm, values in points]
        names: dict[str, Run] = {}
        for run in wanted:
            if names.setdefault(run.name, run) is not run:
                raise FedsplitError(f"Two points of the study have the same values: {run.name}; leave one out.")
        return wanted

    def with_pairs(self, pairs: Sequence[str]) -> Study:
        """The study with `key=value` pairs among its fixed keys, over those of the file.

        Raises:
            FedsplitError: a pair of a key that the grid or an arm sets, or that no study sets.
        """
        said = read_pairs(pairs)
        _apart(self.grid, said, ())
        for arm in self.arms:
            for key in said:
                if key in arm.values:
                    raise FedsplitError(f"--set {key}: arm '{arm.name}' sets it; change the study, or leave it out.")
        return replace(self, fixed={**self.fixed, **said})

    def _cells(self) -> list[tuple[Arm, tuple[Any, ...]]]:
        return list(product(self.arms, product(*self.grid.values())))

    def _run(self, out: Path, arm: Arm, chosen: Values, seed: int) -> Run:
        values: dict[str, Any] = {}
        for file in (*self.files, *arm.files):
            values |= read_toml(file)
        said = {**self.fixed, **arm.values, **chosen}
        try:
            config = resolve({**values, **said, "seed": seed, "resume": ""})
        except FedsplitError as error:
            raise FedsplitError(f"{title(arm.name, chosen) or self.name}: {error}") from None
        if config.engine.workers > 1:
            raise FedsplitError(f"A study does not set engine.workers: {OWN['engine.workers']}.")
        chosen = {key: config.values[key] for key in chosen}  # 1 of a key that takes a fraction is 1.0
        name = folder_name(arm.name, chosen, seed)
        config = config.replace(
            out=str(out / name),
            name=title(arm.name, chosen) or self.name,
            devices__count=config.devices.count or DEFAULT_DEVICES,
        )
        point = ({"arm": arm.name} if arm.name else {}) | chosen
        pairs = tuple(f"{key}={plain(config.values[key])}" for key in said if key.startswith("audit."))
        return Run(name, point, seed, config, self.audit if config.cut.shape != "none" else "", pairs)


def read(file: str | Path) -> Study:
    """The study in `file`.

    Raises:
        FedsplitError: it is missing, is not TOML, or says what no study can.
    """
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        raise FedsplitError(f"Cannot read the study {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FedsplitError(f"{path} is not valid TOML: {error}.") from None
    _only(document, KEYS, str(path))
    grid = _grid(dict(flatten(_table(document, "grid"))))
    fixed = dict(flatten(_table(document, "set")))
    arms = _arms(document.get("arms", []), path)
    _apart(grid, fixed, arms)
    audit = document.get("audit", "")
    if audit:
        suites.suite(audit)
    return Study(
        name=str(document.get("name", path.stem)),
        text=text,
        files=_files(document.get("config", []), path),
        fixed=fixed,
        arms=arms or (Arm("", (), {}),),
        grid=grid,
        seeds=_seeds(document.get("seeds", 1)),
        audit=str(audit),
    )


def title(arm: str, values: Values) -> str:
    """A point in a line: its arm, then key=value; empty where a study has one point alone."""
    return ",".join([*([arm] if arm else []), *(f"{key}={plain(value)}" for key, value in values.items())])


def plain(value: Scalar) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else toml_scalar(value)


def folder_name(arm: str, values: Values, seed: int) -> str:
    """The folder of a point and seed: a plain form of its title; with a digest where that lost something."""
    text = {key: plain(value) for key, value in values.items()}
    name = title(arm, {key: re.sub(r"[^\w.+-]+", "-", value.replace(",", "+")) for key, value in text.items()})
    if len(name) > LONGEST or not all(re.fullmatch(r"[\w.,-]*", value) for value in text.values()):
        name = f"{name[:LONGEST]}-{hashlib.sha256(title(arm, values).encode()).hexdigest()[:8]}"
    return f"{name},seed={seed}" if name else f"seed={seed}"


def _only(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in table:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean '{close[0]}'?)" if close else ""
            raise FedsplitError(
                f"{where} has an unknown entry '{name}'{hint}; it may have {', '.join(known)}; "
                "keys of the config stand under [set] or [grid]."
            )


def _table(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = document.get(name, {})
    if not isinstance(found, Mapping):
        raise FedsplitError(f"{name} must be a table: write [{name}], and its keys below.")
    return found


def _files(names: Any, study: Path) -> tuple[Path, ...]:
    """The config files of a study, beside it, else in the working directory."""
    listed = [names] if isinstance(names, str) else names
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise FedsplitError(f"{study}: config must be a list of files, got {names!r}.")
    return tuple(
        beside if (beside := study.parent / Path(name).expanduser()).is_file() else Path(name) for name in listed
    )


def _arms(listed: Any, study: Path) -> tuple[Arm, ...]:
    if not isinstance(listed, list) or not all(isinstance(item, Mapping) for item in listed):
        raise FedsplitError("arms must be tables: write [[arms]] above each, with a name.")
    made: list[Arm] = []
    for item in listed:
        _only(item, ARM_KEYS, "An arm")
        name = item.get("name", "")
        if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name):
            raise FedsplitError(f"An arm needs a name of letters, digits and . _ + -, got {name!r}.")
        if name in [arm.name for arm in made]:
            raise FedsplitError(f"Two arms have the name '{name}'; rename one.")
        made.append(Arm(name, _files(item.get("config", []), study), dict(flatten(_table(item, "set")))))
    return tuple(made)


def _grid(table: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    for key, values in table.items():
        if not isinstance(values, list) or not values:
            raise FedsplitError(f"[grid] {key} must be a list of values, got {values!r}; one value stands under [set].")
        if len({plain(value) if isinstance(value, Scalar) else repr(value) for value in values}) < len(values):
            raise FedsplitError(f"[grid] {key} has a value twice; leave one out.")
    return {key: tuple(values) for key, values in table.items()}


def _apart(grid: Values, fixed: Values, arms: Sequence[Arm]) -> None:
    for key in (*grid, *fixed, *(key for arm in arms for key in arm.values)):
        if key in OWN:
            raise FedsplitError(f"A study does not set {key}: {OWN[key]}.")
    for key in grid:
        places = (["[set]"] if key in fixed else []) + [f"arm '{arm.name}'" for arm in arms if key in arm.values]
        if places:
            raise FedsplitError(f"{key} stands in [grid] and in {places[0]}; leave it out of one.")


def _seeds(value: Any) -> tuple[int, ...]:
    seeds = list(range(value)) if type(value) is int else value
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise FedsplitError(f"seeds must be a number of seeds, or a list of different ones, got {value!r}.")
    return tuple(seeds)
