"""What a user sees while a run runs: a bar in a terminal, lines in a log, a table at the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from fedsplit.progress import Silent
from fedsplit.runs import RunFolder
from fedsplit.types import Failure, Update
from fedsplit.world import World

log = logging.getLogger("fedsplit")


def watcher(quiet: bool) -> Bar | Quiet:
    """The progress of a command: a bar, or nothing."""
    return Quiet() if quiet else Bar()


class Quiet(Silent):
    """Says nothing but warnings."""

    def __enter__(self) -> Quiet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def note(self, text: str) -> None:
        """A warning."""
        log.warning(text)


class Bar(Silent):
    """A bar over all clients of all rounds with the time left, a line a round, and a table at the end."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("clients"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._task: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._bar.stop()

    def begin(self, world: World, folder: RunFolder, done: int) -> None:
        """Show the run and start the bar."""
        config = world.config
        each = min(config.devices.per_round or len(world.shards), len(world.shards))
        self.console.print(describe(world, folder, done), highlight=False, soft_wrap=True)
        self._bar.start()  # Not before: a config that is refused gets its sentence and nothing else.
        self._task = self._bar.add_task("start", total=(config.rounds - done) * each)

    def round(self, number: int, clients: int) -> None:
        """Name the round."""
        self._bar.update(self._task, description=f"round {number}")

    def heard(self, result: Update | Failure) -> None:
        """One client further."""
        self._bar.advance(self._task)

    def note(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(f"warning: {text}", highlight=False, soft_wrap=True)

    def row(self, row: Mapping[str, Any]) -> None:
        """A line a round."""
        super().row(row)
        self.console.print(line(row), highlight=False, soft_wrap=True)

    def end(self, summary: Mapping[str, Any], folder: RunFolder) -> None:
        """The table."""
        self._bar.stop()
        self.console.print(table(folder))


class Lines(Silent):
    """Plain lines with the time left, for logs (Flower's, CI's): one a round, and one every `SILENCE_S` seconds."""

    SILENCE_S = 15.0

    def __init__(self) -> None:
        super().__init__()
        self._begun = self._spoke = time.monotonic()
        self._number = self._expected = self._heard = self._of_round = self._clients = 0

    def begin(self, world: World, folder: RunFolder, done: int) -> None:
        """Show the run."""
        each = min(world.config.devices.per_round or len(world.shards), len(world.shards))
        self._expected = (world.config.rounds - done) * each
        self._begun = self._spoke = time.monotonic()
        log.info(describe(world, folder, done))

    def round(self, number: int, clients: int) -> None:
        """A round starts."""
        self._number, self._of_round, self._clients = number, 0, clients

    def heard(self, result: Update | Failure) -> None:
        """A line when there was none for a while."""
        self._heard += 1
        self._of_round += 1
        if time.monotonic() - self._spoke > self.SILENCE_S and self._of_round < self._clients:
            self._say(f"round {self._number:>3}  {self._of_round} of {self._clients} clients")

    def row(self, row: Mapping[str, Any]) -> None:
        """A line a round."""
        super().row(row)
        self._say(line(row))

    def note(self, text: str) -> None:
        """A warning."""
        log.warning(text)

    def end(self, summary: Mapping[str, Any], folder: RunFolder) -> None:
        """Where it is."""
        log.info(f"run folder: {folder.path}")

    def _say(self, text: str) -> None:
        self._spoke = time.monotonic()
        each = (self._spoke - self._begun) / max(1, self._heard)
        log.info(f"{text}  about {each * max(0, self._expected - self._heard):.0f} s left")


def describe(world: World, folder: RunFolder, done: int) -> str:
    """The run in two lines."""
    config, trained = world.config, sum(p.numel() for p in (*world.client.values(), *world.server.values()))
    goes_on = f" (goes on after round {done})" if done else ""
    return (
        f"{config.model.name}, cut {world.cut.front}/{len(world.cut.body)}/{world.cut.tail} {config.cut.shape}, "
        f"{config.server.schedule}, {trained:,} parameters train; {len(world.shards)} devices hold "
        f"{sum(map(len, world.shards)):,} images of {config.data.source} ({config.data.partition})\n"
        f"{config.rounds} rounds{goes_on}, run folder {folder.path}"
    )


def line(row: Mapping[str, Any]) -> str:
    """One round in one line."""
    accuracy = f"accuracy {100 * float(row['accuracy']):5.1f} %" if row["accuracy"] != "" else "not tested"
    lost = f"  {row['failures']} failed" if int(row["failures"]) else ""
    up, down = (f"{way} {int(row[f'bytes_{way}']) / 1e6:.2f} MB" for way in ("up", "down"))
    loss, wall = float(row["train_loss"]), float(row["wall_s"])
    return f"round {row['round']:>3}  {accuracy}  train loss {loss:.3f}  {up}  {down}  {wall:.1f} s{lost}"


def table(folder: RunFolder) -> Table:
    """Accuracy, bytes and time by round."""
    shown = Table(title=f"{folder.path.name}: global model on the central test set")
    for name in ("round", "accuracy (%)", "loss", "up (MB)", "down (MB)", "wall (s)", "clients", "failed"):
        shown.add_column(name, justify="right")
    for row in folder.rows("rounds"):
        accuracy = f"{100 * float(row['accuracy']):.1f}" if row["accuracy"] else ""
        loss = f"{float(row['loss']):.3f}" if row["loss"] else ""
        megabytes = (f"{int(row[f'bytes_{way}']) / 1e6:.2f}" for way in ("up", "down"))
        shown.add_row(
            row["round"], accuracy, loss, *megabytes, f"{float(row['wall_s']):.1f}", row["clients"], row["failures"]
        )
    return shown
