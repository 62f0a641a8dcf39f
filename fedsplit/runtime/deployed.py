"""Real devices as the runner: Flower's messages carry the rounds, the stream carries the steps.

The ServerApp's process holds the body and serves it (`fedsplit.runtime.reception`). A device says once who it is, over
Flower's own authenticated channel: its number, and the public key without which nobody can use its rounds' tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedsplit.config import Config
from fedsplit.runtime.flower_ray import MESSAGE_TYPE, FlowerRunner, read_reply, write_job
from fedsplit.runtime.journal import Journal
from fedsplit.runtime.reception import Reception, served
from fedsplit.types import Failure, FedsplitError, Job, Update

log = logging.getLogger(__name__)
HELLO = "query.hello"
POLL_S = 0.5
LOOK_S = 5.0
"""How often, during a round, it is asked which SuperNodes are connected."""


@dataclass(frozen=True)
class Node:
    """A SuperNode and the device behind it."""

    id: int
    partition: int
    partitions: int
    public_key: bytes


class Register:
    """Which SuperNode is which device: asked once of every node that turns up."""

    def __init__(self, grid: Grid, tell: Callable[..., None] = lambda what, **facts: None) -> None:
        self._grid, self._tell = grid, tell
        self._known: dict[int, Node] = {}
        self._here: frozenset[int] = frozenset()
        self._looked_s = 0.0

    def shown(self) -> list[dict[str, Any]]:
        """The devices that introduced themselves, as a table shows them; from any thread."""
        here, known = self._here, tuple(self._known.values())
        rows = ({"number": node.partition, "node": node.id, "connected": node.id in here} for node in known)
        return sorted(rows, key=lambda row: (row["number"], row["node"]))

    def look(self) -> set[int]:
        """The SuperNodes that are connected now."""
        here, self._looked_s = set(self._grid.get_node_ids()), time.monotonic()
        self._here = frozenset(here)
        return here

    def glance(self) -> None:
        """Look, if that was a while ago."""
        if time.monotonic() - self._looked_s > LOOK_S:
            self.look()

    def meet(self, wanted: int, timeout_s: float) -> list[Node]:
        """The devices there are, as soon as `wanted` (0: as many as they say) have introduced themselves.

        Raises:
            FedsplitError: not one has within `timeout_s` seconds, or their node configs contradict each other.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self.ask(max(POLL_S, min(60.0, deadline - time.monotonic())))
            nodes = self.present()
            if len({node.partitions for node in self._connected()}) > 1:
                raise FedsplitError("The SuperNodes' node configs disagree on num-partitions; give all the same.")
            if nodes and len(nodes) >= (wanted or nodes[0].partitions):
                return nodes
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        if not nodes:
            raise FedsplitError(f"No device introduced itself within {timeout_s:g} s; start a SuperNode on one.")
        log.warning("only %d of %d devices are there: the run begins", len(nodes), wanted or nodes[0].partitions)
        return nodes

    def present(self) -> list[Node]:
        """The devices whose SuperNode is connected, by number.

        Who came first is believed while it is there: of two that say the same number, and in how many there are.
        """
        connected = self._connected()
        found: dict[int, Node] = {}
        for node in connected:
            if node.partitions == connected[0].partitions:
                found.setdefault(node.partition, node)
        return [found[number] for number in sorted(found)]

    def _connected(self) -> list[Node]:
        here = self.look()
        return [node for node in self._known.values() if node.id in here]

    def ask(self, timeout_s: float) -> None:
        """Ask the nodes that are not known yet who they are, and wait for their answers."""
        new = [node for node in self.look() if node not in self._known]
        if not new:
            return
        # One by one: of several, Flower leaves out the ids of those that it does not take.
        asked = {name: node for node in new for name in self._grid.push_messages([Message(RecordDict(), node, HELLO)])}
        deadline = time.monotonic() + timeout_s
        while asked and time.monotonic() < deadline:
            for reply in self._grid.pull_messages(list(asked)):
                node = asked.pop(reply.metadata.reply_to_message_id)
                self._introduce(node, reply)
            time.sleep(POLL_S / 5)

    def _introduce(self, node: int, reply: Message) -> None:
        if reply.has_error():
            log.warning("SuperNode %d did not say who it is: %s", node, reply.error.reason)
            return
        try:
            said: Mapping[str, Any] = reply.content["device"]
            fields = (said["partition"], said["partitions"], said["public-key"])
            if [type(field) for field in fields] != [int, int, bytes] or len(fields[2]) != 32:
                raise TypeError("wrong types")
            if not 0 <= fields[0] < fields[1]:
                raise TypeError(f"number {fields[0]} of {fields[1]}")
        except (KeyError, TypeError) as error:
            log.warning("SuperNode %d introduced itself wrongly: %s", node, error)
            return
        self._known.pop(node, None)
        self._known[node] = Node(node, *fields)
        self._tell("device-introduced", number=fields[0], of=fields[1], node=node)


class DeployedRunner(FlowerRunner):
    """Runs jobs on real devices; `Runner` of `fedsplit.round`."""

    def __init__(self, grid: Grid, config: Config, register: Register, reception: Reception) -> None:
        super().__init__(grid, config, [], poll_s=0.1)
        self._register, self._reception = register, reception

    def run(self, jobs: Sequence[Job]) -> Iterator[Update | Failure]:
        """One result per job, in the order in which they arrive."""
        self._register.ask(timeout_s=60.0)
        try:
            yield from super().run(jobs)
        finally:
            self._reception.close()

    def _send(self, job: Job) -> str | Failure:
        nodes = self._register.present()
        node = next((one for one in nodes if one.partition == job.client % one.partitions), None)
        if node is None:
            return Failure(job.client, "its SuperNode is not connected")
        sent, given = self._reception.invite(job, node.id, node.public_key, self._timeout_s)
        content = write_job(self._config, sent)
        content["stream"] = ConfigRecord(vars(given))
        return self._push(job, Message(content, node.id, MESSAGE_TYPE))

    def _received(self, reply: Message, job: Job) -> Update | Failure:
        return self._reception.settle(job.client, read_reply(reply, job))

    def _given_up(self, job: Job) -> Failure | None:
        self._register.glance()
        reason = self._reception.lost(job.client)
        return Failure(job.client, f"its session with the body is over: {reason}") if reason else None


@contextmanager
def serve(grid: Grid, config: Config, journal: Journal) -> Iterator[tuple[int, Callable[[Config], DeployedRunner]]]:
    """The body served to devices, as soon as they are there: how many they are, and the runner of a config.

    `journal` is told of sessions and devices.

    Raises:
        FedsplitError: keys of `link` that cannot be used, or no device.
    """
    check(config)
    with served(config, journal.session) as (server, address):
        log.info("the body is served on %s", address)
        register = Register(grid, journal.event)
        journal.follow(server.sessions, register.shown)
        nodes = register.meet(config.link.nodes, config.link.wait_s)
        yield nodes[0].partitions, lambda it: DeployedRunner(grid, it, register, Reception(it, server, address))


def check(config: Config) -> None:
    """Whether real devices can run `config`.

    Raises:
        FedsplitError: a figure that takes the body and the device's pictures in one process, or neither a
            certificate nor leave to go without.
    """
    if config.body.cosine:
        raise FedsplitError("body.cosine=true needs body and pictures in one place: on devices set it to false.")
    if config.eval.per_client:
        raise FedsplitError("eval.per-client=true tests whole models on the devices' pictures: set it to false.")
    if config.link.plaintext == bool(config.link.certificate):
        raise FedsplitError(
            "The body is served to devices over TLS: set link.certificate and link.key (fedsplit certify makes them), "
            "or link.plaintext=true on a network that you trust."
        )
