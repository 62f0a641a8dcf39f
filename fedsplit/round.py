"""One round at the server: sample -> the clients' work -> gate -> share -> clock.

What a client does is `fedsplit.client.client_round`. Core code knows neither Flower nor Ray: a `Runner`
carries jobs to clients and brings updates back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from fedsplit import personal, shelf
from fedsplit.control import steer
from fedsplit.devices.clock import Cost
from fedsplit.devices.cohort import Cohort, Lost, Settled, dropout, farewell, gather, settle
from fedsplit.share.gate import Refused, admit
from fedsplit.types import Failure, Job, Report, Tensors, Update
from fedsplit.wire.deviation import deviation
from fedsplit.wire.frame import pack, unpack
from fedsplit.wire.link import Link
from fedsplit.world import World, steered


class Runner(Protocol):
    """Carries jobs to clients: in this process, a process pool, or Flower."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Update | Failure]:
        """One result per job, in any order."""


Listener = Callable[[Update | Failure], None]


@dataclass(frozen=True)
class State:
    """What outlives a round: trained parameters, a shared optimiser's state, the clients' own memory, notes on them.

    `memory` is at the server in a simulation only; a client that has nothing to remember is not in it. In a run
    both it and `notes` are on disk (`fedsplit.shelf`): whoever reads them should read what is needed.
    `notes` say what a client kept to itself in its last update (`fedsplit.personal`), `control` is what the
    controllers remember, by name: plain JSON. `clock_s` is the virtual time at which the next round may begin.
    """

    round: int
    model: Tensors
    optimizer: Tensors = field(default_factory=dict)
    memory: Mapping[int, bytes] = field(default_factory=dict)
    notes: Mapping[int, bytes] = field(default_factory=dict)
    control: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    clock_s: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """A finished round: the new state, who took part with what cost, and who failed.

    `lost` are the clients that the virtual clock left out: they dropped out (and failed) or came too late. What
    they had sent and computed by then is in `reports`, and in `cost`, that of the whole round. `waited_s` passed
    before it, until enough devices were available.
    """

    state: State
    updates: tuple[Update, ...]
    failures: tuple[Failure, ...]
    costs: tuple[Cost, ...]
    cost: Cost
    enough: bool
    lost: tuple[Lost, ...] = ()
    waited_s: float = 0.0
    profiles: Mapping[int, str] = field(default_factory=dict)
    begins_s: float = 0.0

    @property
    def reports(self) -> list[Report]:
        """The figures of all who took part."""
        return [update.report for update in self.updates] + [lost.report for lost in self.lost]


def run_round(world: World, state: State, attempt: int, runner: Runner, heard: Listener) -> Outcome:
    """The next round after `state`, on the server.

    SplitFed-V1 gives every client its own copy of the body and averages both sides. SplitFed-V2
    takes clients in turn through one body and averages the client parts. Sequential split learning
    hands everything from client to client. A client that fails is left out; nothing it sent is used. Nor is
    what comes too late by the virtual clock (`fedsplit.devices.cohort`).
    """
    schedule = world.config.server.schedule
    number = state.round + 1
    cohort = gather(world, number, attempt, state.clock_s)
    parallel = schedule == "splitfed-v1"
    desk = _Desk(world, state, cohort, heard)
    if parallel:
        desk.take(runner.run(desk.jobs(sorted(cohort.clients))))
    else:
        for client in cohort.clients:
            desk.take(runner.run(desk.jobs([client])))
            desk.hand_over(everything=schedule == "sequential")
    settled = desk.settled()
    updates = tuple(desk.updates[client] for client in sorted(desk.updates))
    enough = len(updates) >= quorum(world, cohort)
    new = replace(desk.merged(parallel) if enough else state, clock_s=state.clock_s + settled.whole.seconds)
    costs = tuple(settled.costs[update.client] for update in updates)
    profiles = {client: world.fleet[client].name for client in cohort.clients}
    return Outcome(
        new, updates, tuple(desk.failures), costs, settled.whole, enough, settled.lost, cohort.waited_s, profiles,
        begins_s=state.clock_s + cohort.waited_s,
    )  # fmt: skip


def quorum(world: World, cohort: Cohort) -> int:
    """How many updates a round needs at least."""
    return max(1, math.ceil(world.config.share.quorum * cohort.wanted))


class _Desk:
    """The server's table during one round: jobs out, admitted tensors in."""

    def __init__(self, world: World, state: State, cohort: Cohort, heard: Listener) -> None:
        self.world, self.cohort, self.heard = world, cohort, heard
        self.number, self.attempt = cohort.number, cohort.attempt
        self.model, self.optimizer = dict(state.model), dict(state.optimizer)
        self.memory, self.notes = state.memory, state.notes
        self.choices, self.control = steer.propose(world, state.control, cohort.number, cohort.clients)
        if world.config.server.optimizer != "keep":
            self.optimizer = {}
        self.updates: dict[int, Update] = {}
        self.tensors: dict[int, Tensors] = {}
        self.fresh_notes: dict[int, bytes] = {}
        self.links: dict[int, Link] = {}
        self.deviations: dict[int, dict[str, Any]] = {}
        self.failures: list[Failure] = []
        self.dropped: dict[int, Report] = {}

    def jobs(self, clients: Sequence[int]) -> list[Job]:
        """One job per client, from the model as it stands now."""
        client = {name: self.model[name] for name in self.world.client}
        server = pack({name: self.model[name] for name in self.world.server} | self.optimizer)
        frames: dict[Any, bytes] = {}
        same = not self.world.codecs["parameters-down"]  # a codec may treat clients differently
        jobs = []
        for number in clients:
            notes = self.notes.get(number, b"")
            own = personal.away(notes)
            slot = own if same else number
            link = self.links[number] = self._link(number)
            link.recall(unpack(notes))
            if slot not in frames:
                down = {name: value for name, value in client.items() if name not in own}
                frames[slot] = link.encode("parameters-down", down)
                held = unpack(self.memory.get(number, b"")) if not same else {}
                self.deviations[number] = deviation(self._link(number), held, down, frames[slot])
            link.hold("parameters-up", client)
            jobs.append(self._job(number, frames[slot], server, notes))
        return jobs

    def _link(self, client: int) -> Link:
        return steered(self.world, self.choices.get(client, "")).link(self.number, client)

    def _job(self, client: int, down: bytes, server: bytes, notes: bytes) -> Job:
        memory, notes = self.memory.get(client, b""), personal.for_the_body(notes)
        return Job(client, self.number, self.attempt, down, server, memory, notes, self.choices.get(client, ""))

    def take(self, results: Iterator[Update | Failure]) -> None:
        """Let in what passes the gate."""
        client = {name: self.model[name] for name in self.world.client}
        server = {name: self.model[name] for name in self.world.server}
        may_lack = personal.may_withhold(self.world)
        limit = self.world.config.share.max_update_bytes or 2 * len(pack(client)) + 65536
        for result in results:
            if isinstance(result, Update) and (fraction := dropout(self.world, self.cohort, result.client)) is not None:
                self.dropped[result.client] = result.report
                result = Failure(result.client, farewell(fraction))
            if isinstance(result, Update):
                try:
                    link = self.links[result.client]
                    up, state, own = admit(result, link, client, server, limit, may_lack)
                    found: dict[str, Any] = self.deviations.get(result.client, {})
                    measured = replace(result.report, **found)
                    self.updates[result.client] = result = replace(result, report=measured)
                    self.tensors[result.client] = {**up, **state}
                    missing = set(client) - set(up)
                    self.fresh_notes[result.client] = personal.write_notes(own, missing, link.kept())
                except Refused as reason:
                    result = Failure(result.client, str(reason))
            if isinstance(result, Failure):
                self.failures.append(result)
            self.heard(result)

    def hand_over(self, everything: bool) -> None:
        """In turn: the next client meets the server's part (and, when sequential, all) as the last left it."""
        if self.tensors:
            last = next(reversed(self.tensors.values()))
            names = self.model if everything else self.world.server
            self.model |= {name: last[name] for name in names}
            self.optimizer = {name: value for name, value in last.items() if "|" in name}

    def settled(self) -> Settled:
        """What the virtual clock says of the round; updates that came too late for it are left out."""
        reports = {client: update.report for client, update in self.updates.items()} | self.dropped
        settled = settle(self.world, self.cohort, reports)
        for client in set(self.updates) - set(settled.costs):
            del self.updates[client], self.tensors[client], self.fresh_notes[client]
        return settled

    def merged(self, parallel: bool) -> State:
        """The state after this round."""
        schedule = self.world.config.server.schedule
        model = self.model
        if schedule != "sequential":
            averaged = model if parallel else {name: model[name] for name in self.world.client}
            ids = sorted(self.tensors)
            weights = [float(self.updates[client].samples) for client in ids]
            merge = self.world.config.piece("share.merge").merge
            model = {**model, **merge(averaged, [self.tensors[client] for client in ids], weights)}
        kept = self.optimizer if self.world.config.server.optimizer == "keep" and not parallel else {}
        fresh = {client: update.memory for client, update in self.updates.items()}
        memory, notes = shelf.put(self.memory, self.number, fresh), shelf.put(self.notes, self.number, self.fresh_notes)
        control = steer.attended(self.world.config, self.control, self.number, self.updates)
        return State(self.number, model, kept, memory, notes, control)


def sample(world: World, number: int, attempt: int, clock_s: float = 0.0) -> list[int]:
    """The clients of a round that begins at virtual time `clock_s`, in the order in which they would take turns."""
    return list(gather(world, number, attempt, clock_s).clients)
