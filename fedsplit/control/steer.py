"""Controllers in a run: they propose before a round, and some observe what it brought.

One form chooses for groups of devices and learns from accuracy (`groups`, `propose`, `observe`), the other for
every client of a round from what the server knows of it (`assign`, `fedsplit.control.facts`). A controller's
memory is plain JSON; it is part of the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsplit.body import planner
from fedsplit.client import plan_batches
from fedsplit.config import Config, keys
from fedsplit.control.facts import Facts, Load
from fedsplit.control.loads import load_of
from fedsplit.places import PLACES, Place
from fedsplit.types import FedsplitError, Job, Scalar
from fedsplit.world import World, steered

if TYPE_CHECKING:
    from fedsplit.round import Outcome

HELD_OUT = "held-out"
LAST = "last-round"
# Keys of the core that may differ from client to client; so may those of codecs and of plans.
FREE = ("local.batch-size", "local.max-steps")
Choices = dict[int, dict[str, Scalar]]
Memories = Mapping[str, dict[str, Any]]


def controllers(config: Config) -> dict[str, Any]:
    """The controllers that `control.tune` names, in its order."""
    return dict(zip(config.names("control.tune"), config.pieces("control.tune"), strict=True))


def learns(config: Config) -> bool:
    """Whether a controller learns from the accuracy on held-out samples."""
    return any(hasattr(piece, "observe") for piece in config.pieces("control.tune"))


def propose(
    world: World, memories: Memories, number: int, cohort: Iterable[int]
) -> tuple[dict[int, str], dict[str, dict[str, Any]]]:
    """The keys that every client of `cohort` is given in round `number`, as JSON, and the controllers' new memories.

    Those that ask how long clients take come last: what the others chose decides it.
    """
    chosen: Choices = {client: {} for client in sorted(cohort)}
    after = {name: dict(memory) for name, memory in memories.items()}
    pieces = controllers(world.config)
    for name, piece in sorted(pieces.items(), key=lambda item: getattr(item[1], "timed", False)):
        stream = world.key("control", name, number)
        if hasattr(piece, "assign"):
            facts = _facts(world, memories, number, chosen, name, piece)
            own, after[name] = piece.assign(facts, after.get(name, {}), stream)
        else:
            proposals, after[name] = piece.propose(after.get(name, {}), number, piece.groups, stream)
            group = groups(world, piece.groups)
            own = {client: proposals[group[client]] for client in chosen}
        for client, values in own.items():
            chosen[client] |= values
    return {client: dump(values) for client, values in chosen.items() if values}, after


def dump(values: Mapping[str, Scalar]) -> str:
    """The choices for one client as they stand in its job."""
    return json.dumps(values, sort_keys=True) if values else ""


def attended(config: Config, memories: Memories, number: int, clients: Iterable[int]) -> Memories:
    """The memories after a round in which the updates of `clients` were let in."""
    if not any(hasattr(piece, "assign") for piece in config.pieces("control.tune")):
        return memories
    return {**memories, LAST: {**memories.get(LAST, {}), **{str(client): number for client in sorted(clients)}}}


def first(memories: Memories, accuracy: float) -> dict[str, dict[str, Any]]:
    """The memories before the first round, with the accuracy on held-out samples."""
    return {**memories, HELD_OUT: {"accuracy": accuracy}}


def observe(world: World, outcome: Outcome, accuracy: float) -> dict[str, dict[str, Any]]:
    """The memories after a round that took the accuracy on held-out samples to `accuracy`.

    A group has the seconds of the slowest of its clients; one that had no client learns nothing, nor does
    any in a round at full depth, whatever was proposed.
    """
    memories, number = outcome.state.control, outcome.state.round
    plans = world.config.pieces("body.plans")
    recovers = any(hasattr(plan, "recovers") and plan.recovers(number, world.config.rounds) for plan in plans)
    after = first({name: dict(memory) for name, memory in memories.items()}, accuracy)
    gain = accuracy - memories[HELD_OUT]["accuracy"]
    for name, piece in controllers(world.config).items():
        if not hasattr(piece, "observe"):
            continue
        group = groups(world, piece.groups)
        seconds = [0.0] * piece.groups
        for update, cost in zip(outcome.updates, outcome.costs, strict=True):
            seconds[group[update.client]] = max(seconds[group[update.client]], cost.seconds)
        gains = [gain if spent and not recovers else None for spent in seconds]
        after[name] = piece.observe(after.get(name, {}), number, gains, seconds)
    return after


def groups(world: World, count: int) -> list[int]:
    """The group of every device: `count` groups of devices with alike numbers of samples, the smallest first."""
    sizes = np.array([len(shard) for shard in world.shards])
    ranks = np.empty(len(sizes), dtype=int)
    ranks[sizes.argsort(kind="stable")] = np.arange(len(sizes))
    return [int(rank) * count // len(sizes) for rank in ranks]


def _facts(world: World, memories: Memories, number: int, chosen: Choices, name: str, piece: Any) -> Facts:
    last, timed = memories.get(LAST, {}), getattr(piece, "timed", False)
    devices = range(len(world.shards))
    return Facts(
        round=number,
        clients=tuple(chosen),
        samples=tuple(len(shard) for shard in world.shards),
        last=tuple(last.get(str(device), 0) for device in devices),
        steps=world.config.local.max_steps,
        labels=_labels(world, name, piece) if hasattr(piece, "reveal") and not memories.get(name) else (),
        devices=world.fleet if timed or hasattr(piece, "placed") else (),
        loads=_loads(world, chosen, last) if timed else {},
    )


def _loads(world: World, chosen: Choices, last: Mapping[str, int]) -> dict[int, Load]:
    return {client: load_of(world, dump(values), client, str(client) in last) for client, values in chosen.items()}


def _labels(world: World, name: str, piece: Any) -> tuple[tuple[float, ...], ...]:
    """What every device says of its labels; the draw of its noise is the device's own, and always the same."""
    labels, classes = world.data.train.labels, len(world.data.classes)
    return tuple(
        piece.reveal(np.bincount(labels[shard], minlength=classes).tolist(), world.key("reveal", name, device))
        for device, shard in enumerate(world.shards)
    )


def check(world: World) -> None:
    """Whether the controllers have what they learn from, and whatever they choose can be had.

    Raises:
        FedsplitError: a key that is unknown, that must not differ, that no named piece has, or that two
            controllers set; a value that the key does not take; and what a controller goes by and the run lacks.
    """
    set_by: dict[str, str] = {}
    for name, piece in controllers(world.config).items():
        for key in piece.keys:
            _check_key(world.config, name, key)
            if key in set_by:
                raise FedsplitError(f"control.tune: '{set_by[key]}' and '{name}' both set {key}; name one of them.")
            set_by[key] = name
        for choice in piece.choices:
            other = steered(world, dump(choice))
            planner.check(other, _sizes(other))
        if hasattr(piece, "observe"):
            _check_learner(world, name, piece)
        if getattr(piece, "timed", False):
            _check_timed(world.config, name, piece)
        if hasattr(piece, "placed"):
            piece.meet(profile.name for profile in world.fleet)


def may_differ(key: str) -> bool:
    """Whether a key may differ from client to client."""
    known = {f"{place.prefix}.{piece}" for place in _free_lists() for piece in place.pieces}
    return key in FREE or (key in keys() and key.rpartition(".")[0] in known)


def is_named(config: Config, key: str) -> bool:
    """Whether a key that may differ does anything in `config`: it is the core's, or its piece is in a list."""
    named = {f"{place.prefix}.{piece}" for place in _free_lists() for piece in config.names(place.key)}
    return key in FREE or key.rpartition(".")[0] in named


def _free_lists() -> list[Place]:
    return [place for place in PLACES if place.prefix == "wire" or place.key == "body.plans"]


def _check_key(config: Config, name: str, key: str) -> None:
    if not may_differ(key):
        raise FedsplitError(
            f"control.tune={name} sets {key}, which must not differ from client to client; those that may are "
            f"{', '.join(FREE)}, and the keys of codecs and of the pieces of body.plans."
        )
    if not is_named(config, key):
        piece = key.rpartition(".")[0].partition(".")[2]
        raise FedsplitError(f"control.tune={name} sets {key}, but no '{piece}' is named; name it in a list.")


def _check_learner(world: World, name: str, piece: Any) -> None:
    config = world.config
    if not config.data.local_test:
        raise FedsplitError(
            f"control.tune={name} learns from accuracy on held-out samples: set data.local-test, e.g. 0.1."
        )
    if not any((config.devices.flops_per_s, config.devices.server_flops_per_s, config.devices.fleet)):
        raise FedsplitError(
            f"control.tune={name} weighs accuracy against virtual seconds, and all devices are infinitely "
            "fast; set devices.flops-per-s and devices.server-flops-per-s."
        )
    if piece.groups > len(world.shards):
        raise FedsplitError(
            f"control.{name}.groups={piece.groups} is more than the {len(world.shards)} devices; lower it."
        )


def _check_timed(config: Config, name: str, piece: Any) -> None:
    devices = config.devices
    if not any((devices.fleet, devices.flops_per_s, devices.up_bytes_per_s, devices.down_bytes_per_s)):
        raise FedsplitError(
            f"control.tune={name} goes by the seconds that devices take, and all are infinitely fast; set "
            "devices.fleet, or devices.flops-per-s and the like."
        )
    if "local.batch-size" in piece.keys and not config.local.max_steps:
        raise FedsplitError(
            f"control.tune={name} sets the samples of a step for a fixed number of steps: set local.max-steps, and "
            "local.epochs high enough for as many."
        )


def _sizes(world: World) -> list[int]:
    """The sizes of the steps of the device with the most samples."""
    largest = max(world.shards, key=len)
    return [len(indices) for indices, _ in plan_batches(world, Job(0, 1, 0, b"", b""), largest)]
