"""A whole run: config -> world -> rounds -> run folder; and how it goes on after it died."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedsplit import runs
from fedsplit.client import learning_rate
from fedsplit.config import Config
from fedsplit.data.partitions import plot as plot_partition
from fedsplit.metrics.quality import Quality, evaluate
from fedsplit.round import Outcome, Runner, State, run_round, sample
from fedsplit.runs import RunFolder
from fedsplit.runtime.faults import parse as parse_faults
from fedsplit.types import STREAMS, Failure, FedsplitError, Update
from fedsplit.world import World, world

SUMS = (
    *(f"bytes_{way}" for way in ("up", "down", "activations", "gradients", "parameters")),
    "client_flops", "server_flops", "virtual_s", "energy_j", "wall_s", "kept_samples", "failures",
)  # fmt: skip


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


def run(config: Config, runner: Runner, *, root: Path = Path("runs"), progress: Progress | None = None) -> Path:
    """Run `config` to its end, or, with key `resume`, the rest of an earlier run.

    Args:
        config: what to run. With key `resume` only `rounds` counts, where it asks for more; the rest
            is read from the run folder.
        runner: who carries jobs to clients.
        root: where a run folder is made when `out` does not say.
        progress: who watches.

    Returns:
        The run folder.

    Raises:
        FedsplitError: whatever is wrong, before anything is written; or a round that stays below
            its quorum, after a checkpoint.
    """
    progress = progress or Silent()
    if config.resume:
        folder, stored = RunFolder.open(config.resume)
        config = stored.replace(rounds=max(stored.rounds, config.rounds))
        built = world(config)
        check(config, built)
        state = folder.restore(start(built))
        if config.rounds > stored.rounds:
            folder.note(config)
    else:
        built = world(config)
        check(config, built)
        folder = RunFolder.create(config, root)
        state = start(built)
        plot_partition(built.shards, built.data.train.labels, built.data.classes, folder.path / "partition.png")
    progress.begin(built, folder, state.round)
    loop = _Loop(config, built, folder, runner, progress)
    while state.round < config.rounds:
        state = loop.round(state)
        if state.round % config.engine.checkpoint_every == 0 or state.round == config.rounds:
            folder.save(state)
    built.load(state.model)
    summary = summarise(config, built, folder)
    folder.finish(summary, built.model_state())
    draw(folder)
    progress.end(summary, folder)
    return folder.path


def start(built: World) -> State:
    """The state before the first round: the parameters as they were created."""
    return State(0, {name: built.initial[name] for name in built.trains.names})


def check(config: Config, built: World) -> None:
    """What only the finished world can tell.

    Raises:
        FedsplitError: a personalised test without held-out samples, more devices a round than there
            are, or a fault that can never happen.
    """
    devices = len(built.shards)
    if config.devices.per_round > devices:
        raise FedsplitError(
            f"devices.per-round={config.devices.per_round} is more than the {devices} devices there are; "
            "lower it, or raise devices.count."
        )
    for fault in parse_faults(config.engine.faults):
        if fault.client >= devices or fault.round not in (None, *range(1, config.rounds + 1)):
            raise FedsplitError(
                f"engine.faults: '{fault.kind}' never happens to client {fault.client}: "
                f"clients are 0 to {devices - 1}, rounds 1 to {config.rounds}."
            )
    if config.eval.per_client and not config.data.local_test:
        raise FedsplitError("eval.per-client=true needs samples of its own: set data.local-test, e.g. 0.2.")


@dataclass(frozen=True)
class _Loop:
    config: Config
    world: World
    folder: RunFolder
    runner: Runner
    progress: Progress

    def round(self, state: State) -> State:
        """One round, repeated while it stays below the quorum, with its rows written."""
        begun = time.perf_counter()
        number = state.round + 1
        failures: list[Failure] = []
        for attempt in range(self.config.share.attempts):
            self.progress.round(number, len(sample(self.world, number, attempt)))
            outcome = run_round(self.world, state, attempt, self.runner, self.progress.heard)
            failures += outcome.failures
            for failure in outcome.failures:
                self.progress.note(f"round {number}: client {failure.client} is left out: {failure.reason}")
            if outcome.enough:
                break
            self._below(state, outcome, attempt)
        self.world.load(outcome.state.model)
        quality = self._quality(number)
        row = _row(self.world, outcome, quality, len(failures), time.perf_counter() - begun)
        self._write(number, outcome, failures, quality, row)
        self.progress.row(row)
        return outcome.state

    def _below(self, state: State, outcome: Outcome, attempt: int) -> None:
        share = self.config.share
        wanted = len(outcome.updates) + len(outcome.failures)
        succeeded = f"{len(outcome.updates)} of {wanted} clients succeeded"
        text = f"round {state.round + 1}: {succeeded}, below share.quorum={share.quorum:g}"
        if share.below_quorum == "stop" or attempt + 1 == share.attempts:
            self.folder.save(state)
            raise FedsplitError(f"{text}; stopped, go on with: fedsplit resume {self.folder.path}")
        self.progress.note(f"{text}; repeated")

    def _quality(self, number: int) -> Quality | None:
        if number % self.config.eval.every and number != self.config.rounds:
            return None
        data = self.world.data
        return evaluate(
            self.world.parts, data.test, np.arange(len(data.test)), len(data.classes),
            batch_size=self.config.eval.batch_size, **self.world.look,
        )  # fmt: skip

    def _write(
        self, number: int, outcome: Outcome, failures: list[Failure], quality: Quality | None, row: Mapping[str, Any]
    ) -> None:
        clients = [
            _client_row(number, update, cost.seconds, cost.joules)
            for update, cost in zip(outcome.updates, outcome.costs, strict=True)
        ]
        empty = dict.fromkeys(clients[0], "") if clients else {}
        clients += [{**empty, "round": number, "client": f.client, "failure": f.reason} for f in failures]
        self.folder.append("clients", clients)
        self.folder.append("ledger", [{"round": number, **_by_stream(outcome)}])
        if quality is not None:
            self.folder.append("classes", _class_rows(number, quality, self.world.data.classes))
        self.folder.append("rounds", [row])


def summarise(config: Config, built: World, folder: RunFolder) -> dict[str, Any]:
    """The figures of a finished run, derived from its tables."""
    rows, clients = folder.rows("rounds"), folder.rows("clients")
    last = rows[-1]
    peaks = {
        side: max((int(row[f"{side}_peak_bytes"]) for row in clients if row[f"{side}_peak_bytes"]), default=0)
        for side in ("client", "server")
    }
    personal = last["personal_accuracy"]
    return {
        "accuracy": float(last["accuracy"]),
        "loss": float(last["loss"]),
        "personal_accuracy": float(personal) if personal else None,
        "rounds": len(rows),
        "seed": config.seed,
        **runs.totals(rows, SUMS),
        "client_peak_bytes": peaks["client"],
        "server_peak_bytes": peaks["server"],
        "trainable_params": sum(p.numel() for p in (*built.client.values(), *built.server.values())),
        "client_trainable_params": sum(p.numel() for p in built.client.values()),
        "weights_sha256": runs.sha256(built.model_state()),
        "ledger_sha256": runs.sha256_text((folder.path / "ledger.csv").read_text()),
        "device": str(built.device),
        "provenance": runs.provenance(config),
    }


def draw(folder: RunFolder) -> Path:
    """Plot test accuracy against rounds and against bytes; returns the picture's path."""
    from matplotlib.figure import Figure

    rows = [row for row in folder.rows("rounds") if row["accuracy"]]
    accuracy = [100 * float(row["accuracy"]) for row in rows]
    sent = np.cumsum([float(row["bytes_up"]) + float(row["bytes_down"]) for row in folder.rows("rounds")]) / 1e6
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.plot([int(row["round"]) for row in rows], accuracy, marker="o", color="#0072B2")
    right.plot([sent[int(row["round"]) - 1] for row in rows], accuracy, marker="o", color="#D55E00")
    left.set(xlabel="round", ylabel="test accuracy (%)")
    left.xaxis.get_major_locator().set_params(integer=True)
    right.set(xlabel="bytes on the wire, all clients, both ways (MB)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path = folder.path / "accuracy.png"
    figure.savefig(path, dpi=150)
    return path


def _row(built: World, outcome: Outcome, quality: Quality | None, failures: int, wall_s: float) -> dict[str, Any]:
    reports = [update.report for update in outcome.updates]
    seen = sum(report.kept_samples for report in reports)
    tested = sum(report.personal_samples for report in reports)
    personal = sum((report.personal_accuracy or 0.0) * report.personal_samples for report in reports)
    streams = _by_stream(outcome)
    return {
        "round": outcome.state.round,
        "accuracy": quality.accuracy if quality else "",
        "loss": quality.loss if quality else "",
        "personal_accuracy": personal / tested if tested else "",
        "train_loss": sum(r.train_loss * r.kept_samples for r in reports) / max(1, seen),
        "clients": len(reports),
        "failures": failures,
        "kept_samples": seen,
        **{f"bytes_{way}": sum(v for k, v in streams.items() if k.endswith(f"_{way}")) for way in ("up", "down")},
        **{
            f"bytes_{kind}": sum(v for k, v in streams.items() if k.startswith(kind))
            for kind in ("activations", "gradients", "parameters")
        },
        "client_flops": sum(report.client_flops for report in reports),
        "server_flops": sum(report.server_flops for report in reports),
        "learning_rate": learning_rate(built, outcome.state.round),
        "virtual_s": outcome.cost.seconds,
        "energy_j": outcome.cost.joules,
        "wall_s": round(wall_s, 4),
    }


def _client_row(number: int, update: Update, seconds: float, joules: float) -> dict[str, Any]:
    report = update.report
    streams = {f"bytes_{name.replace('-', '_')}": report.bytes.get(name, 0) for name in STREAMS}
    return {
        "round": number,
        "client": update.client,
        "samples": update.samples,
        "kept_samples": report.kept_samples,
        "steps": report.steps,
        "train_loss": report.train_loss,
        "personal_accuracy": "" if report.personal_accuracy is None else report.personal_accuracy,
        "personal_samples": report.personal_samples,
        **streams,
        "client_flops": report.client_flops,
        "server_flops": report.server_flops,
        "client_peak_bytes": report.client_peak_bytes,
        "server_peak_bytes": report.server_peak_bytes,
        "virtual_s": seconds,
        "energy_j": joules,
        "wall_s": round(report.wall_s, 4),
        "failure": "",
    }


def _class_rows(number: int, quality: Quality, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {"round": number, "class": name, "samples": int(total), "accuracy": float(right / total) if total else ""}
        for name, total, right in zip(classes, quality.class_samples, quality.class_correct, strict=True)
    ]


def _by_stream(outcome: Outcome) -> dict[str, int]:
    return {
        name.replace("-", "_"): sum(update.report.bytes.get(name, 0) for update in outcome.updates) for name in STREAMS
    }
