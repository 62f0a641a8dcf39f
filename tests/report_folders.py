"""Run folders for the tests of reports: one of a real run, and small ones written by hand."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fleets import TINY

from fedsplit import experiment
from fedsplit.config import resolve, to_toml
from fedsplit.runtime.inprocess import Loop
from fedsplit.types import Scalar

RICH: dict[str, Scalar] = {
    **TINY,
    "name": "rich",
    "rounds": 2,
    "devices.count": 3,
    "data.limit": 60,
    "data.partition": "iid",
    "data.local-test": 0.2,
    "eval.per-client": True,
    "train": "all",
    "body.plans": "layerdrop",
    "control.tune": "bandit",
    "devices.fleet": "raspberry-pi-4:2,orin-nano:1",
    "devices.server-flops-per-s": 1e12,
    "wire.activations-up": "half",
}


def real(folder: Path, **changes: Scalar) -> Path:
    """A run of the smallest model that has everything but an audit."""
    config = resolve(RICH).replace(**changes, out=str(folder))
    return experiment.run(config, Loop(config))


def table(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file of `rows`."""
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def written(folder: Path, accuracies: Sequence[float | str], finished: bool = True, **changes: Scalar) -> Path:
    """A folder with `accuracies` by round; a round sends 3 MB up and 1 MB down, takes 2 s and 5 J."""
    folder.mkdir(parents=True)
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    values = {**resolve({}).values, "rounds": len(accuracies), **named}
    (folder / "config.toml").write_text("# fedsplit: 0.0.9\n# commit: abc\n" + to_toml(values))
    costs = {"bytes_up": 3_000_000, "bytes_down": 1_000_000, "virtual_s": 2.0, "energy_j": 5.0}
    rounds = [{"round": number, "accuracy": accuracy, **costs} for number, accuracy in enumerate(accuracies, 1)]
    table(folder / "rounds.csv", rounds)
    if finished:
        count = len(accuracies)
        figures = {"accuracy": accuracies[-1], "rounds": count, "bytes_up": 3e6 * count, "bytes_down": 1e6 * count}
        (folder / "summary.json").write_text(json.dumps({**figures, "virtual_s": 2.0 * count, "energy_j": 5.0 * count}))
    return folder


def audited(folder: Path, picture: bytes = b"") -> None:
    """What `fedsplit audit` leaves, written by hand."""
    (folder / "audit").mkdir()
    attacks = [
        {"attack": "linear", "seeds": 2, "ssim": 0.4, "ssim_ci_low": 0.35, "ssim_ci_high": 0.45, "psnr": 12.0},
        {"attack": "labels", "seeds": 1, "labels_right": 0.5},
    ]
    found = {"worst_ssim": 0.4, "attacks": attacks, "mean_image": {"ssim": 0.2}}
    (folder / "audit" / "audit.json").write_text(json.dumps(found))
    (folder / "audit" / "audit.png").write_bytes(picture)
