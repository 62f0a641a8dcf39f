"""Who watches a run: the protocol, and a watcher that says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedsplit.runs import RunFolder
from fedsplit.types import Failure, Update
from fedsplit.world import World


class Progress(Protocol):
    """Who watches a run."""

    def begin(self, world: World, folder: RunFolder, done: int) -> None:
        """The run starts, or goes on after `done` rounds."""

    def round(self, number: int, clients: int) -> None:
        """A round starts with so many clients."""

    def heard(self, result: Update | Failure) -> None:
        """A client is done, or has failed."""

    def row(self, row: Mapping[str, Any]) -> None:
        """A round is over; its row of rounds.csv."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def end(self, summary: Mapping[str, Any], folder: RunFolder) -> None:
        """The run is over."""


@dataclass
class Silent:
    """Watches without a word, and keeps the rows."""

    rows: list[Mapping[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def begin(self, world: World, folder: RunFolder, done: int) -> None:
        """Nothing."""

    def round(self, number: int, clients: int) -> None:
        """Nothing."""

    def heard(self, result: Update | Failure) -> None:
        """Nothing."""

    def row(self, row: Mapping[str, Any]) -> None:
        """Keep the row."""
        self.rows.append(row)

    def note(self, text: str) -> None:
        """Keep the line."""
        self.notes.append(text)

    def end(self, summary: Mapping[str, Any], folder: RunFolder) -> None:
        """Nothing."""
