"""The phases of a hardening, and the folder that it leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedsplit.config import Config, load, to_toml
from fedsplit.harden import recipe
from fedsplit.harden.card import finish
from fedsplit.harden.training import Training
from fedsplit.runs import RunFolder, write
from fedsplit.types import FedsplitError


def run(
    config: Config,
    out: str | Path | None = None,
    *,
    quiet: bool = False,
    after_epoch: Callable[[int], None] | None = None,
) -> Path:
    """Harden, or go on with, the front of `config` in folder `out` (else key `out`); returns the folder.

    It holds `config.toml`, `epochs.csv` (a row an epoch; `loss` is the task's plus the penalties, the masks' L1 norm
    `l1` comes on top), `checkpoint/`, and when finished `model.safetensors`, `card.json` and, last, `card.md`. On the
    CPU a resumed hardening ends in the same weights, bit for bit. `after_epoch` is called with the epochs done.

    Raises:
        FedsplitError: keys that do not go together, data or weights that cannot be read, a folder that holds
            something else, or a defence that diverged.
    """
    folder = Path(out or config.out or f"runs/harden-{config.name}").expanduser().resolve()
    _refuse_other(config, folder)
    if (folder / "card.md").is_file():
        return folder
    torch.set_num_threads(config.threads)
    training = Training(config, folder)
    _begin(config, folder)
    console = Console(stderr=True, quiet=quiet)
    while not training.over:
        if training.position.epoch < training.phase.last:
            row = training.epoch()
            RunFolder(folder).append("epochs", [row])
            console.print(_line(row), highlight=False, soft_wrap=True)
        if not training.position.removed and training.position.epoch == training.phase.last:
            training.remove()
            console.print(_removal(training.position.figures), highlight=False, soft_wrap=True)
        training.save()
        if after_epoch:
            after_epoch(training.position.epoch)
    check_outcome(training)
    finish(training)
    return folder


def check_outcome(training: Training) -> None:
    """Refuse a model that the defence has ruined.

    That is one whose weights are not finite, or which on the test split is no better than to name the commonest class
    every time, although it was trained, or was better before.

    Raises:
        FedsplitError: it is so.
    """
    figures, chance = training.position.figures, training.chance()
    figures["after"] = training.size() | {"accuracy": training.accuracy()}
    mend = "lower the weights of front.penalties, harden.lr or harden.l1, or train longer"
    if not training.finite():
        raise FedsplitError(f"The defence diverged: the weights are no finite numbers; {mend}.")
    tried = training.position.epoch > 0 or figures["before"]["accuracy"] > chance
    if tried and figures["after"]["accuracy"] <= chance:
        raise FedsplitError(
            f"Accuracy ends at {figures['after']['accuracy']:.3f}, and naming the commonest class every time has "
            f"{chance:.3f}: the defence diverged, or the training was too short; {mend}."
        )


def _refuse_other(config: Config, folder: Path) -> None:
    """Refuse a folder that holds anything but a hardening of the same config."""
    file = folder / "config.toml"
    if file.is_file():
        theirs, ours = (recipe.deciding(each) for each in (load([file]), config))
        other = [f"{name} {theirs[name]!r}, now {ours[name]!r}" for name in ours if ours[name] != theirs[name]]
        if other:
            raise FedsplitError(
                f"{folder} holds a run of another config ({'; '.join(other[:3])}); choose another --out."
            )
        if not (folder / "checkpoint").is_dir() or (folder / "rounds.csv").exists():
            raise FedsplitError(f"{folder} exists and is no hardening; choose another --out.")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FedsplitError(f"{folder} exists and is no hardening; choose another --out.")


def _begin(config: Config, folder: Path) -> None:
    """Make the folder and its config, unless they are there."""
    file = folder / "config.toml"
    head = "# A resolved config of fedsplit harden; go on with: fedsplit harden --config THIS_FILE --out THIS_FOLDER\n"
    try:
        (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write(file, head + to_toml(config.values))
    except OSError as error:
        raise FedsplitError(f"Cannot write the folder {folder}: {error.strerror}; give a writable --out.") from None


def _line(row: dict[str, Any]) -> str:
    terms = "".join(f"  {name.removeprefix('penalty.')} {row[name]:.4f}" for name in row if name.startswith("penalty."))
    return (
        f"epoch {row['epoch']}  {row['phase']}  loss {row['loss']:.4f}  task {row['task_loss']:.4f}{terms}  "
        f"heads {row['heads']}  mlp {row['mlp']}  blocks {row['blocks']}  test {100 * row['accuracy']:.1f} %"
    )


def _removal(figures: dict[str, Any]) -> str:
    before, now = figures["before"], figures["removed"]
    return (
        f"removal: front of {before['front']} blocks to {now['front']}, "
        f"{100 * now['front_flops'] / before['front_flops']:.1f} % of its FLOPs, "
        f"{100 * now['front_parameters'] / before['front_parameters']:.1f} % of its parameters, "
        f"test {100 * now['accuracy']:.1f} %"
    )
