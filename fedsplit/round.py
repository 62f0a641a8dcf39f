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
from fedsplit.devices.clock import Cost, cost, round_cost
from fedsplit.rng import numpy_rng
from fedsplit.share.gate import Refused, admit
from fedsplit.types import Failure, Job, Tensors, Update
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
    controllers remember, by name: plain JSON.
    """

    round: int
    model: Tensors
    optimizer: Tensors = field(default_factory=dict)
    memory: Mapping[int, bytes] = field(default_factory=dict)
    notes: Mapping[int, bytes] = field(default_factory=dict)
    control: Mapping[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """A finished round: the new state, who took part with what cost, and who failed."""

    state: State
    updates: tuple[Update, ...]
    failures: tuple[Failure, ...]
    costs: tuple[Cost, ...]
    cost: Cost
    enough: bool


def run_round(world: World, state: State, attempt: int, runner: Runner, heard: Listener) -> Outcome:
    """The next round after `state`, on the server.

    SplitFed-V1 gives every client its own copy of the body and averages both sides. SplitFed-V2
    takes clients in turn through one body and averages the client parts. Sequential split learning
    hands everything from client to client. A client that fails is left out; nothing it sent is used.
    """
    schedule = world.config.server.schedule
    number = state.round + 1
    order = sample(world, number, attempt)
    parallel = schedule == "splitfed-v1"
    desk = _Desk(world, state, number, attempt, heard, order)
    if parallel:
        desk.take(runner.run(desk.jobs(sorted(order))))
    else:
        for client in order:
            desk.take(runner.run(desk.jobs([client])))
            desk.hand_over(everything=schedule == "sequential")
    updates = tuple(desk.updates[client] for client in sorted(desk.updates))
    enough = len(updates) >= max(1, math.ceil(world.config.share.quorum * len(order)))
    costs = tuple(cost(update.report, world.config.devices) for update in updates)
    new = desk.merged(parallel) if enough else state
    return Outcome(new, updates, tuple(desk.failures), costs, round_cost(costs, parallel=parallel), enough)


class _Desk:
    """The server's table during one round: jobs out, admitted tensors in."""

    def __init__(
        self, world: World, state: State, number: int, attempt: int, heard: Listener, order: Sequence[int]
    ) -> None:
        self.world, self.number, self.attempt, self.heard = world, number, attempt, heard
        self.model, self.optimizer = dict(state.model), dict(state.optimizer)
        self.memory, self.notes = state.memory, state.notes
        self.choices, self.control = steer.propose(world, state.control, number, order)
        if world.config.server.optimizer != "keep":
            self.optimizer = {}
        self.updates: dict[int, Update] = {}
        self.tensors: dict[int, Tensors] = {}
        self.fresh_notes: dict[int, bytes] = {}
        self.links: dict[int, Link] = {}
        self.deviations: dict[int, dict[str, Any]] = {}
        self.failures: list[Failure] = []

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


def sample(world: World, number: int, attempt: int) -> list[int]:
    """The clients of a round, in the order in which a serial schedule takes them."""
    count = len(world.shards)
    wanted = min(world.config.devices.per_round or count, count)
    draw = numpy_rng(world.key("sample", number, attempt)).permutation(count)
    return [int(client) for client in draw[:wanted]]
