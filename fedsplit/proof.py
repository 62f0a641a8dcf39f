"""The proof of a run, `proof.csv`: by round what its weights and its ledger were, each row chained to those before it.

Row 0 says what the run began with: config, data, initial weights. Two runs whose chains agree up to a round agree in
all of it; where they differ, the first row that does says in what (`compare`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch

from fedsplit.config import Config
from fedsplit.data import store
from fedsplit.round import Outcome, State
from fedsplit.runs import RunFolder, sha256, sha256_text
from fedsplit.types import FedsplitError
from fedsplit.world import World, is_local

TABLE = "proof"
COLUMNS = ("round", "config", "data", "weights", "ledger", "clients", "chain")
PICTURES = 256
"""Of so many pictures, evenly spaced, the pixels count; of all of them the labels, and whose they are."""


def origin(built: World, state: State) -> dict[str, Any]:
    """Row 0 of a run that begins with `state`."""
    row = dict.fromkeys(COLUMNS, "") | {"round": 0, "config": config_digest(built.config), "data": data_digest(built)}
    return _chained(row | {"weights": sha256(state.model)}, "")


def row(outcome: Outcome, ledger: Mapping[str, Any], before: str) -> dict[str, Any]:
    """The row of a finished round, whose row of ledger.csv is `ledger`, after the chain `before`."""
    clients = [
        [update.client for update in outcome.updates],
        sorted({failure.client for failure in outcome.failures}),
        sorted(lost.client for lost in outcome.lost),
    ]
    found = dict.fromkeys(COLUMNS, "") | {"round": outcome.state.round, "weights": sha256(outcome.state.model)}
    found |= {"ledger": sha256_text(json.dumps(dict(ledger))), "clients": sha256_text(json.dumps(clients))}
    return _chained(found, before)


def config_digest(config: Config) -> str:
    """A digest of all keys that can change a result."""
    return sha256_text(json.dumps({name: value for name, value in config.values.items() if not is_local(name)}))


def data_digest(built: World) -> str:
    """A digest of labels, shards, and some of the pictures."""
    parts: list[object] = [built.data.name, built.data.classes]
    for images in (built.data.train, built.data.test):
        some = np.unique(np.linspace(0, max(0, len(images) - 1), PICTURES).astype(np.int64))[: len(images)]
        parts += [images.labels, np.asarray(images.pixels[some])]
    return store.digest(*parts, *built.shards, *built.held_out)


def compare(one: Path, other: Path) -> dict[str, Any]:
    """Whether two runs agree, as plain values: `agree`, `rounds` that they share and agree in, `differences`.

    Raises:
        FedsplitError: one is no run folder, has no proof, or was changed after it was written.
    """
    runs = [RunFolder.open(path) for path in (one, other)]
    proofs = [_read(folder) for folder, _ in runs]
    differences = [f"config: {text}" for text in _config_differences(runs[0][1], runs[1][1])]
    first = [proof[0] for proof in proofs]
    differences += ["the data differ"] * (first[0]["data"] != first[1]["data"])
    differences += ["the initial weights differ"] * (first[0]["weights"] != first[1]["weights"])
    rounds = 0
    for rows in zip(proofs[0][1:], proofs[1][1:], strict=False):
        odd = [name for name in ("weights", "ledger", "clients") if rows[0][name] != rows[1][name]]
        if odd:
            differences.append(f"round {rows[0]['round']} is the first that differs, in: {', '.join(odd)}")
            break
        rounds = int(rows[0]["round"])
    lengths = [len(proof) - 1 for proof in proofs]
    if lengths[0] != lengths[1]:
        differences.append(f"one has {lengths[0]} rounds, the other {lengths[1]}")
    return {"agree": not differences, "rounds": rounds, "differences": differences}


def _config_differences(one: Config, other: Config) -> list[str]:
    names = sorted({*one.values, *other.values})
    pairs = ((name, one.values.get(name), other.values.get(name)) for name in names if not is_local(name))
    return [f"{name} is {a!r} in one and {b!r} in the other" for name, a, b in pairs if a != b]


def _read(folder: RunFolder) -> Sequence[Mapping[str, str]]:
    rows = [row for row in folder.rows(TABLE) if None not in row.values()]
    if not rows or rows[0]["round"] != "0":
        raise FedsplitError(
            f"{folder.path} has no {TABLE}.csv that begins with its first round: an earlier fedsplit made it; "
            "compare weights_sha256 of the two summary.json instead."
        )
    before = ""
    for found in rows:
        if _chained(dict(found), before)["chain"] != found["chain"]:
            raise FedsplitError(
                f"{folder.path / f'{TABLE}.csv'} was changed after round {found['round']}; it proves nothing."
            )
        before = found["chain"]
    _check_model(folder)
    return rows


def _check_model(folder: RunFolder) -> None:
    """Whether the model of a finished run is the one that its summary names."""
    file, summary = folder.path / "model.safetensors", folder.path / "summary.json"
    if not summary.is_file():
        return
    try:
        wanted = json.loads(summary.read_text())["weights_sha256"]
        same = sha256(safetensors.torch.load_file(file)) == wanted
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise FedsplitError(
            f"{folder.path} has no sound model and summary ({type(error).__name__}); run it again."
        ) from None
    if not same:
        raise FedsplitError(f"{file} is not what its summary.json names; run it again.")


def _chained(found: dict[str, Any], before: str) -> dict[str, Any]:
    text = json.dumps([before, *(str(found[name]) for name in COLUMNS if name != "chain")])
    return found | {"chain": hashlib.sha256(text.encode()).hexdigest()}
