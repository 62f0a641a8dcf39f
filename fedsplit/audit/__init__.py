"""`fedsplit audit`: attack a finished run with fresh attackers, score what they find, and say so in a verdict.

scene.py      what the server saw, and what an attacker may know
conduct.py    every attack with every seed; a stopped audit goes on
report.py     audit.json, audit.csv, images.csv, exposure.csv, audit.png
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedsplit.audit import exposure, report
from fedsplit.audit.conduct import Findings, Watch, conduct, own_config
from fedsplit.audit.suites import suite
from fedsplit.config import Config, load
from fedsplit.front.models import read_weights
from fedsplit.runs import RunFolder, provenance, sha256
from fedsplit.types import FedsplitError
from fedsplit.world import World, world


@dataclass(frozen=True)
class Target:
    """What is audited: a world with the weights of the run, where it came from, and the rows of its clients.csv."""

    built: World
    source: str
    clients: tuple[Mapping[str, str], ...]


def of_run(path: str | Path, suite_name: str, pairs: Sequence[str] = ()) -> Target:
    """A finished run as a target, with the keys of a suite and `key=value` pairs of section `audit`.

    Raises:
        FedsplitError: there is no run, it has not ended, or a pair is not of the audit.
    """
    folder, config = RunFolder.open(path)
    weights = folder.path / "model.safetensors"
    if not weights.is_file():
        raise FedsplitError(
            f"{folder.path} has no model.safetensors: the run has not ended; go on with: fedsplit resume {folder.path}"
        )
    for pair in pairs:
        if not pair.startswith("audit."):
            raise FedsplitError(f"--set {pair}: a run is audited as it ran; only keys of 'audit.' can be set.")
    config = asked(config, suite_name, pairs)
    built = _world(config)
    state = read_weights(weights)
    names = set(built.backbone.vit.state_dict())
    if names != set(state):
        raise FedsplitError(f"{weights} is not of the model in {folder.path / 'config.toml'}; undo what was changed.")
    built.backbone.vit.load_state_dict(state)
    return Target(built, str(folder.path), tuple(folder.rows("clients")))


def of_config(files: Sequence[str], suite_name: str, pairs: Sequence[str] = ()) -> Target:
    """A config, with the weights that it starts from (`model.checkpoint`), as a target.

    Raises:
        FedsplitError: whatever is wrong with it.
    """
    config = load(files, pairs)
    built = _world(asked(config, suite_name, [pair for pair in pairs if pair.startswith("audit.")]))
    built.load(built.initial)
    return Target(built, ", ".join(files), ())


def run(target: Target, folder: Path, gates: Mapping[str, float], watch: Watch, strict: bool = False) -> dict[str, Any]:
    """Attack `target` and write the findings to `folder`; returns audit.json's document.

    Raises:
        FedsplitError: as `conduct`, a gate without a figure, or a folder that cannot be written.
    """
    built = target.built
    report.check_gates(gates, {piece.finds for piece in built.config.pieces("audit.attacks")})
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FedsplitError(f"Cannot write the audit to {folder}: {error.strerror}; give another --out.") from None
    findings: Findings = conduct(built, folder, watch, strict)
    devices = exposure.by_device(built, target.clients) if target.clients else []
    about = {
        "source": target.source,
        "weights_sha256": sha256(built.model_state()),
        "model": built.config.model.name,
        "cut": {"front": built.cut.front, "tail": built.cut.tail, "shape": built.config.cut.shape},
        "defences": list(built.config.names("front.edits") + built.config.names("front.penalties")),
        "settings": own_config(built.config),
        "exposure": exposure.summary(findings.scene, devices),
        "versions": provenance(built.config),
    }
    found = report.document(findings, about, gates)
    report.save(folder, findings, found, devices)
    return found


def _world(config: Config) -> World:
    """The world of `config`, its section `audit` included: a run's world does without."""
    return replace(world(config), config=config)


def asked(config: Config, suite_name: str, pairs: Sequence[str]) -> Config:
    """`config` with the keys of a suite, then the pairs."""
    given = load((), pairs).values
    said = {pair.partition("=")[0].strip() for pair in pairs}
    values = {**suite(suite_name), **{name: given[name] for name in said}}
    return config.replace(**{name.replace(".", "__").replace("-", "_"): value for name, value in values.items()})
