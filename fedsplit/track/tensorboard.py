"""TensorBoard: event files in the run folder."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.types import FedsplitError

if TYPE_CHECKING:  # the config reads the registry of trackers
    from fedsplit.config import Config

FOLDER = "tensorboard"
# Columns of rounds.csv by the group of charts in which they stand, where that is not "round".
GROUPS: dict[str, tuple[str, ...]] = {
    "test": ("accuracy", "loss", "personal_accuracy"),
    "train": ("train_loss", "local_loss", "local_accuracy", "learning_rate", "kept_samples"),
    "cost": ("virtual_s", "energy_j", "client_flops", "server_flops", "wall_s", "waited_s"),
}
# Hyper-parameters that every run shows, so that runs can be compared; beside them what is not at its default.
SHOWN = (
    *("seed", "rounds", "train", "model.name", "cut.front", "cut.tail", "cut.shape", "optimizer.name", "optimizer.lr"),
    *("data.source", "data.partition", "data.alpha", "devices.count", "devices.per-round", "local.batch-size"),
)
METRICS = ("test/accuracy", "test/loss")


@dataclass(frozen=True)
class TensorBoard:
    """Writes scalars of every round, what controllers chose, and the keys as hyper-parameters to `tensorboard/`.

    A run that goes on adds a file that takes back the rounds after its checkpoint, so that no step is there twice.

    Paper: none.
    Place: track.
    Off: not named; the package is then not imported.
    Deviates: nothing.
    """

    def check(self) -> None:
        """Refuse an installation without TensorBoard.

        Raises:
            FedsplitError: the package is missing.
        """
        if importlib.util.find_spec("tensorboard") is None:
            raise FedsplitError("track=tensorboard needs the package 'tensorboard': pip install 'fedsplit[track]'.")

    def open(self, config: Config, folder: Path, done: int) -> Events:
        """The event file of the run in `folder`, which has `done` rounds."""
        return Events(config, folder / FOLDER, done)


class Events:
    """One event file; a step is a round."""

    def __init__(self, config: Config, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        # Readers then drop what an earlier file has of later rounds; a first file has nothing to take back.
        self._writer: Any = SummaryWriter(str(folder), purge_step=done + 1 if folder.is_dir() else None)
        self._done = done
        # The writer's own add_hparams makes a second folder, which shows up as a second run.
        session, start, self._end = hparams(shown(config), dict.fromkeys(METRICS, 0.0))
        self._add(session, start)
        self._writer.flush()

    def round(self, row: Mapping[str, Any], ledger: Mapping[str, Any], choices: Sequence[Mapping[str, Any]]) -> None:
        """The scalars of a round, on disk when this returns: a kill loses none of them."""
        self._done = int(row["round"])
        for tag, value in scalars(row, ledger, choices):
            self._writer.add_scalar(tag, value, self._done)
        self._writer.flush()

    def summary(self, figures: Mapping[str, Any]) -> None:
        """The run's figures, at its last round, and its end."""
        for name, value in figures.items():
            if is_number(value):
                self._writer.add_scalar(f"summary/{name}", value, self._done)
        self._add(self._end)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()

    def _add(self, *parts: Any) -> None:
        for part in parts:
            self._writer.file_writer.add_summary(part)


def scalars(
    row: Mapping[str, Any], ledger: Mapping[str, Any], choices: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, float]]:
    """(tag, value) of a round; empty cells have none."""
    group = {name: where for where, names in GROUPS.items() for name in names}
    for name, value in row.items():
        if name != "round" and is_number(value):
            yield f"{group.get(name, 'bytes' if name.startswith('bytes_') else 'round')}/{name}", value
    for name, value in ledger.items():
        if name != "round" and is_number(value):
            yield f"streams/{name}", value
    yield from chosen(choices)


def chosen(choices: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """What controllers chose: a value by group of devices, or the mean over the clients of a round."""
    found: dict[str, list[float]] = {}
    for row in choices:
        who = f"/group {row['group']}" if row.get("group", "") != "" else ""
        for name, value in row.items():
            if name not in ("controller", "round", "client", "group") and is_number(value):
                found.setdefault(f"control/{row['controller']}/{name}{who}", []).append(value)
    for tag, values in found.items():
        yield tag, statistics.fmean(values)


def shown(config: Config) -> dict[str, int | float | bool | str]:
    """The hyper-parameters: `SHOWN`, and every key that is not at its default and can change a result."""
    from fedsplit.config import keys
    from fedsplit.world import is_local

    known = keys()
    return {
        name: value
        for name, value in config.values.items()
        if name in SHOWN or not (is_local(name) or value == known[name].default)
    }


def is_number(value: Any) -> bool:
    """Whether a cell holds a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)
