"""Who is told of a run round by round, beside its CSV and JSON files, which are always there.

A *tracker* is one file: a piece with `check()`, which refuses before anything is written, and
`open(config, folder, done) -> Tracker`, for a run that starts, or goes on after `done` rounds. No result depends on
one. Trackers have no keys of their own: `track` is a key, and TOML has no table of the same name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedsplit.track.tensorboard import TensorBoard

if TYPE_CHECKING:  # the config reads the registry
    from fedsplit.config import Config

TRACKERS: dict[str, type[Any]] = {"tensorboard": TensorBoard}

Row = Mapping[str, Any]


class Tracker(Protocol):
    """Who follows one run."""

    def round(self, row: Row, ledger: Row, choices: Sequence[Row]) -> None:
        """A round is over: its rows of rounds.csv, ledger.csv and choices.csv; an empty text is an empty cell."""

    def summary(self, figures: Row) -> None:
        """The run has ended: what summary.json holds."""

    def close(self) -> None:
        """Nothing more will come, whether the run has ended or was stopped."""


@dataclass(frozen=True)
class Trackers:
    """All trackers of a run as one."""

    each: tuple[Tracker, ...]

    def round(self, row: Row, ledger: Row, choices: Sequence[Row]) -> None:
        """Tell all."""
        for tracker in self.each:
            tracker.round(row, ledger, choices)

    def summary(self, figures: Row) -> None:
        """Tell all."""
        for tracker in self.each:
            tracker.summary(figures)


def check(config: Config) -> None:
    """Refuse what `track` names but this installation lacks.

    Raises:
        FedsplitError: a tracker's package is missing.
    """
    for piece in config.pieces("track"):
        piece.check()


@contextmanager
def opened(config: Config, folder: Path, done: int) -> Iterator[Trackers]:
    """The trackers that `track` names, for the run in `folder`, which has `done` rounds; closed at the end."""
    with ExitStack() as stack:
        trackers: list[Tracker] = []
        for piece in config.pieces("track"):
            tracker: Tracker = piece.open(config, folder, done)
            stack.callback(tracker.close)
            trackers.append(tracker)
        yield Trackers(tuple(trackers))
