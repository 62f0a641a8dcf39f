"""What is already there of a run: a finished one is taken as it is, one of another config is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsplit import audit, experiment, track
from fedsplit.audit.conduct import own_config
from fedsplit.config import Config
from fedsplit.devices import fit
from fedsplit.front import models
from fedsplit.runs import RunFolder
from fedsplit.types import FedsplitError, Scalar
from fedsplit.world import LOCAL_SECTIONS, ghost

# Keys that change no figure of a finished run, beside those of the engine.
ASIDE = ("out", "resume", "name", "data.cache", "track")

Summary = Mapping[str, Any]


def summary(config: Config, aside: Sequence[str] = ASIDE) -> Summary | None:
    """The summary of the run of `config` in its folder `out`; None if it is still to be run, or to be ended.

    Raises:
        FedsplitError: the folder holds a run of another config, or no run.
    """
    path = Path(config.out)
    if not (path / "config.toml").is_file():
        return None
    stored = RunFolder.open(path)[1]
    there, wanted = deciding(stored.values, aside), deciding(config.values, aside)
    for key in wanted:
        if there[key] != wanted[key]:
            raise FedsplitError(
                f"{path} holds a run with {key}={there[key]}, not {wanted[key]}; delete it or choose another --out."
            )
    file = path / "summary.json"
    if not file.is_file():
        return None
    found: Summary = json.loads(file.read_text(encoding="utf-8"))
    return found


def deciding(values: Mapping[str, Scalar], aside: Sequence[str] = ASIDE) -> dict[str, Scalar]:
    """The keys that decide the figures of a run."""
    return {key: value for key, value in values.items() if key not in aside and not key.startswith(LOCAL_SECTIONS)}


def done(path: Path, rounds: int) -> float:
    """The fraction of `rounds` that the tables of the run in `path` have."""
    try:
        lines = (path / "rounds.csv").read_bytes().count(b"\n") - 1
    except OSError:
        return 0.0
    return min(1.0, max(0, lines) / rounds)


def worst(path: Path) -> Summary:
    """The figures of the audit in run folder `path`; empty where there is none."""
    return {name: value for name, value in _audit(path).items() if name.startswith("worst_")}


def audited(path: Path, suite: str, pairs: Sequence[str] = ()) -> bool:
    """Whether the run in `path` has an audit of that suite, with those `key=value` pairs."""
    found = _audit(path)
    if not found:
        return False
    wanted = own_config(audit.asked(RunFolder.open(path)[1], suite, pairs))
    return bool(found["settings"] == json.loads(json.dumps(wanted)))


def check(config: Config, weights: bool = False) -> None:
    """Refuse a run that cannot begin: what it lacks, its data, shards, cut and devices; with `weights` those, too.

    Raises:
        FedsplitError: what is wrong with it.
    """
    track.check(config)
    built = ghost(config)
    experiment.check(config, built)
    fit.check(built)
    if weights:
        models.create(config.model, len(built.data.classes), config.seed)


def _audit(path: Path) -> Summary:
    file = path / "audit" / "audit.json"
    if not file.is_file():
        return {}
    found: Summary = json.loads(file.read_text(encoding="utf-8"))
    return found
