"""Controllers in a run: they propose before a round, and observe what it brought.

A controller's memory is plain JSON; it is part of the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsplit.body import planner
from fedsplit.config import Config, keys, resolve
from fedsplit.types import FedsplitError, Scalar
from fedsplit.world import World

if TYPE_CHECKING:
    from fedsplit.round import Outcome

HELD_OUT = "held-out"
Memories = Mapping[str, dict[str, Any]]


def controllers(config: Config) -> dict[str, Any]:
    """The controllers that `control.tune` names, in its order."""
    return dict(zip(config.names("control.tune"), config.pieces("control.tune"), strict=True))


def propose(world: World, memories: Memories, number: int) -> tuple[dict[int, str], dict[str, dict[str, Any]]]:
    """The keys that every client is given in round `number`, as JSON, and the controllers' new memories."""
    chosen: dict[int, dict[str, Scalar]] = {}
    after = {name: dict(memory) for name, memory in memories.items()}
    for name, piece in controllers(world.config).items():
        stream = world.key("control", name, number)
        proposals, after[name] = piece.propose(after.get(name, {}), number, piece.groups, stream)
        for client, group in enumerate(groups(world, piece.groups)):
            chosen.setdefault(client, {}).update(proposals[group])
    return {client: json.dumps(values, sort_keys=True) for client, values in chosen.items()}, after


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


def check(world: World, sizes: Sequence[int]) -> None:
    """Whether the controllers have what they learn from, and whatever they choose can be had.

    `sizes` are the samples of a client's steps.

    Raises:
        FedsplitError: a key that is unknown or that no named piece has, no held-out samples, no virtual
            clock, or more groups than devices.
    """
    config = world.config
    for name, piece in controllers(world.config).items():
        for key in piece.keys:
            place = key.rpartition(".")[0].partition(".")
            named = {part for names in config.values.values() if isinstance(names, str) for part in names.split(",")}
            if key not in keys() or place[2] not in {part.strip() for part in named}:
                raise FedsplitError(f"control.tune={name} sets {key}, but no '{place[2]}' is named; name it in a list.")
        for choice in piece.choices:
            planner.check(replace(world, config=resolve({**config.values, **choice})), sizes)
        if not config.data.local_test:
            raise FedsplitError(
                f"control.tune={name} learns from accuracy on held-out samples: set data.local-test, e.g. 0.1."
            )
        rates = (config.devices.flops_per_s, config.devices.server_flops_per_s)
        if not any(rates):
            raise FedsplitError(
                f"control.tune={name} weighs accuracy against virtual seconds, and all devices are infinitely "
                "fast; set devices.flops-per-s and devices.server-flops-per-s."
            )
        if piece.groups > len(world.shards):
            raise FedsplitError(
                f"control.{name}.groups={piece.groups} is more than the {len(world.shards)} devices; lower it."
            )
