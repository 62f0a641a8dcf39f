"""The pre-training loop, and the folder that it leaves."""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedsplit.config import to_toml
from fedsplit.pretrain import recipe
from fedsplit.pretrain.recipe import Pretrain
from fedsplit.pretrain.training import Training
from fedsplit.runs import write
from fedsplit.types import FedsplitError, Scalar


def run(settings: Pretrain, out: str | Path | None = None, *, after_step: Callable[[int], None] | None = None) -> Path:
    """Train, or go on with, the run in folder `out` (else `settings.out`); returns the folder.

    It holds `config.toml`, `log.csv`, `checkpoint/`, and when finished `<name>.safetensors` and
    `card.md`. With a budget in epochs on the CPU a resumed run ends in the same weights, bit for bit.
    `after_step` is called with the number of steps done.

    Raises:
        FedsplitError: keys that do not go together, data that cannot be read, a folder that holds
            something else, or a loss that is no longer finite.
        KeyboardInterrupt: Ctrl-C; a checkpoint is written first.
    """
    recipe.check(settings)
    folder = Path(out or settings.out or f"runs/pretrain-{settings.title}").expanduser().resolve()
    _refuse_other(settings, folder)
    if (folder / "card.md").is_file():
        return folder
    torch.set_num_threads(settings.threads)
    training = Training(settings, folder)
    _begin(settings, folder)
    console = Console(stderr=True)
    with _bar(console) as bar, _interrupts() as interrupted:
        task = bar.add_task("start", total=1.0)
        while training.progress < 1.0:
            began = time.perf_counter()
            lr = training.step()
            done = training.progress
            if done >= 1.0 or training.position.step % training.per_epoch == 0:
                console.print(_line(training.row(lr), done), highlight=False, soft_wrap=True)
            training.position.wall_s += time.perf_counter() - began
            due = training.position.trained_s - training.saved_s >= 60 * settings.checkpoint_minutes
            if due or done >= 1.0 or interrupted:
                training.save()
            if interrupted:
                console.print(f"stopped after step {training.position.step}; the same command goes on in {folder}")
                raise KeyboardInterrupt
            bar.update(task, completed=done, description=f"step {training.position.step}")
            if after_step:
                after_step(training.position.step)
    # Not before: `python -m fedsplit.pretrain.probe` must not find its module imported by the package.
    from fedsplit.pretrain.card import card

    path = training.export()
    write(folder / "card.md", card(settings, training, path))
    return folder


def _refuse_other(settings: Pretrain, folder: Path) -> None:
    """Refuse a folder that holds anything but a run of the same config."""
    file = folder / "config.toml"
    if file.is_file():
        theirs, ours = (_deciding(each) for each in (recipe.load([file]), settings))
        other = [f"{name} {theirs[name]!r}, now {ours[name]!r}" for name in ours if ours[name] != theirs[name]]
        if other:
            raise FedsplitError(f"{folder} holds a run of another config ({'; '.join(other)}); choose another 'out'.")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FedsplitError(f"{folder} exists and is no pre-training run; choose another 'out'.")


def _begin(settings: Pretrain, folder: Path) -> None:
    """Make the folder and its config, unless they are there."""
    file = folder / "config.toml"
    head = "# A fedsplit pre-training run; go on with: fedsplit pretrain --config THIS_FILE --out THIS_FOLDER\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write(file, head + to_toml(settings.values()))
    except OSError as error:
        reason = f"{error.strerror}; set 'out' to a writable place."
        raise FedsplitError(f"Cannot write the folder {folder}: {reason}") from None


def _deciding(settings: Pretrain) -> dict[str, Scalar]:
    """The keys that decide the weights."""
    return dataclasses.replace(settings, out="", cache="", checkpoint_minutes=0.0).values()


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    left = (TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, *left, console=console, transient=True, disable=not console.is_terminal)


def _line(row: dict[str, Any], done: float) -> str:
    return (
        f"{100 * done:5.1f} %  epoch {row['epoch']:g}  step {row['step']}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
        f"{row['images_per_s']:.0f} images/s  validation {100 * row['val_accuracy']:.1f} %"
    )


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C fills the list, so that a step ends before the run does; a second one is not held back."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)
