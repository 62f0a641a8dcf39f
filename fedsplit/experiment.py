"""A whole run: config -> world -> rounds -> run folder; and how it goes on after it died."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedsplit import local, personal, proof, tables, track
from fedsplit.body import planner
from fedsplit.client import plan_batches
from fedsplit.config import Config
from fedsplit.control import steer
from fedsplit.data import partitions
from fedsplit.devices import cohort, fit
from fedsplit.metrics.quality import Quality, evaluate
from fedsplit.progress import Progress, Silent
from fedsplit.round import Outcome, Runner, State, run_round, sample
from fedsplit.runs import RunFolder
from fedsplit.runtime.faults import parse as parse_faults
from fedsplit.tables import by_stream, choice_rows, class_rows, client_rows, draw, round_row, summarise, unit_rows
from fedsplit.types import Failure, FedsplitError, Images, Job
from fedsplit.wire import chain
from fedsplit.world import Indices, World, world


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
        track.check(config)
        built = world(config)
        check(config, built)
        state = folder.restore(start(built))
        if config.rounds > stored.rounds:
            folder.note(config)
    else:
        track.check(config)
        built = world(config)
        check(config, built)
        fit.check(built)
        folder = RunFolder.create(config, root)
        state = folder.shelved(start(built))
        folder.append(proof.TABLE, [proof.origin(built, state)])
        held = (built.shards, built.data.train.labels, built.data.classes)
        folder.table("partition", partitions.table(*held))
        partitions.plot(*held, folder.path / "partition.png")
    progress.begin(built, folder, state.round)
    with track.opened(config, folder.path, state.round) as trackers:
        loop = _Loop(config, built, folder, runner, progress, trackers)
        while state.round < config.rounds:
            state = loop.round(state)
            if state.round % config.engine.checkpoint_every == 0 or state.round == config.rounds:
                folder.save(state)
        if config.eval.per_client:
            folder.table("personal", own_models(built, state, folder.rows("clients")))
        built.load(state.model)
        summary = summarise(config, built, folder)
        folder.finish(summary, built.model_state(), built.backbone.metadata)
        trackers.summary(summary)
    draw(config, folder)
    progress.end(summary, folder)
    return folder.path


def own_models(built: World, state: State, clients: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """A row per device: its own model, what all share with what it kept to itself, on its held-out samples.

    A device that never took part has the global model. `clients` are the rows of clients.csv.
    """
    rows: list[dict[str, Any]] = []
    took_part = Counter(int(row["client"]) for row in clients if not (row["failure"] or row["late"]))
    for client, held_out in enumerate(built.held_out):
        rounds = took_part[client]
        own = personal.own(state.memory.get(client, b"")) | personal.own_at_server(state.notes.get(client, b""))
        built.load(state.model | own)
        tested = personal.accuracy(built, client) if len(held_out) else ""
        rows.append({"client": client, "rounds": rounds, "samples": len(held_out), "accuracy": tested})
    return rows


def start(built: World) -> State:
    """The state before the first round: the parameters as they were created."""
    return State(0, {name: built.initial[name] for name in built.trains.names})


def check(config: Config, built: World) -> None:
    """What only the finished world can tell.

    Raises:
        FedsplitError: a personalised test without held-out samples, more devices a round than there
            are, a fault that can never happen, a client that cannot work alone as it is asked to, or that
            should keep parameters of its own where all take turns at one model, codecs that cannot be
            had on their stream, a plan that cannot be had, or a controller without what it learns from.
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
    cohort.check(built)
    local.check(built)
    personal.check(built)
    chain.check(built.codecs)
    largest = max(built.shards, key=len)
    sizes = [len(indices) for indices, _ in plan_batches(built, Job(0, 1, 0, b"", b""), largest)]
    planner.check(built, sizes)
    steer.check(built)
    if config.eval.per_client and not config.data.local_test:
        raise FedsplitError("eval.per-client=true needs samples of its own: set data.local-test, e.g. 0.2.")


@dataclass(frozen=True)
class _Loop:
    config: Config
    world: World
    folder: RunFolder
    runner: Runner
    progress: Progress
    trackers: track.Trackers

    def round(self, state: State) -> State:
        """One round, repeated while it stays below the quorum, with its rows written."""
        begun = time.perf_counter()
        number = state.round + 1
        state = self._with_control(state)
        failures: list[Failure] = []
        lost_s = lost_j = 0.0  # in attempts that stayed below the quorum
        for attempt in range(self.config.share.attempts):
            self.progress.round(number, len(sample(self.world, number, attempt, state.clock_s)))
            outcome = run_round(self.world, state, attempt, self.runner, self.progress.heard)
            failures += outcome.failures
            for failure in outcome.failures:
                self.progress.note(f"round {number}: client {failure.client} is left out: {failure.reason}")
            if outcome.enough:
                break
            self._below(state, outcome, attempt)
            spent, state = outcome.cost, replace(state, clock_s=outcome.state.clock_s)
            lost_s, lost_j = lost_s + spent.seconds, lost_j + spent.joules
        spent = replace(outcome.cost, seconds=lost_s + outcome.cost.seconds, joules=lost_j + outcome.cost.joules)
        outcome = replace(outcome, cost=spent)
        self.world.load(outcome.state.model)
        quality = self._quality(number)
        row = round_row(self.world, outcome, quality, len(failures), time.perf_counter() - begun)
        outcome = replace(outcome, state=self._observed(outcome))
        self._write(number, outcome, failures, quality, row)
        self.progress.row(row)
        if row["recover_error"] != "" and row["recover_error"] > row["stale_error"]:
            self.progress.note(
                f"round {number}: recovered weights are further from the sent ones ({row['recover_error']:.3g}) "
                f"than the clients' stale copies ({row['stale_error']:.3g}): recover costs more than it brings"
            )
        return outcome.state

    def _with_control(self, state: State) -> State:
        """Where a controller learns from it, the state with the held-out accuracy of its model."""
        if not steer.learns(self.config) or steer.HELD_OUT in state.control:
            return state
        self.world.load(state.model)
        return replace(state, control=steer.first(state.control, self._held_out()))

    def _observed(self, outcome: Outcome) -> State:
        """The state after what the controllers learn from the round."""
        if not steer.learns(self.config):
            return outcome.state
        after = steer.observe(self.world, outcome, self._held_out())
        return replace(outcome.state, control=after)

    def _held_out(self) -> float:
        samples = np.sort(np.concatenate(self.world.held_out))
        return self._test(self.world.data.train, samples).accuracy

    def _test(self, images: Images, samples: Indices) -> Quality:
        return evaluate(
            self.world.parts, images, samples, len(self.world.data.classes),
            batch_size=self.config.eval.batch_size, **self.world.look,
        )  # fmt: skip

    def _below(self, state: State, outcome: Outcome, attempt: int) -> None:
        share = self.config.share
        wanted = len(outcome.updates) + len(outcome.failures) + sum(not lost.reason for lost in outcome.lost)
        succeeded = f"{len(outcome.updates)} of {wanted} clients succeeded"
        text = f"round {state.round + 1}: {succeeded}, below share.quorum={share.quorum:g}"
        if share.below_quorum == "stop" or attempt + 1 == share.attempts:
            self.folder.save(state)
            raise FedsplitError(f"{text}; stopped, go on with: fedsplit resume {self.folder.path}")
        self.progress.note(f"{text}; repeated")

    def _quality(self, number: int) -> Quality | None:
        if number % self.config.eval.every and number != self.config.rounds:
            return None
        test = self.world.data.test
        return self._test(test, np.arange(len(test)))

    def _write(
        self, number: int, outcome: Outcome, failures: list[Failure], quality: Quality | None, row: Mapping[str, Any]
    ) -> None:
        self.folder.append("clients", client_rows(number, outcome, failures))
        ledger = {"round": number, **by_stream(outcome), **tables.raw_by_stream(outcome)}
        self.folder.append("ledger", [ledger])
        if proven := self.folder.rows(proof.TABLE):  # a run that an earlier version began has no proof
            self.folder.append(proof.TABLE, [proof.row(outcome, ledger, proven[-1]["chain"])])
        if quality is not None:
            self.folder.append("classes", class_rows(number, quality, self.world.data.classes))
        self.folder.append("units", unit_rows(self.world, number, outcome))
        choices = choice_rows(self.config, number, outcome.state.control)
        self.folder.append("choices", choices)
        self.folder.append("rounds", [row])
        self.trackers.round(row, ledger, choices)
