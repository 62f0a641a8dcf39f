"""What a client's round moves and computes before it is run: counted on shapes, coded by its codecs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedsplit.client import client_share
from fedsplit.control.facts import Load
from fedsplit.hollow import frame_bytes
from fedsplit.types import Stream, Tensors
from fedsplit.wire.chain import of_shapes_alone
from fedsplit.world import World, codecs_for

Groups = Sequence[tuple[Tensors, int]]
# Samples of the frames by which the bytes of one are counted: a frame's head hardly weighs.
MANY = 64


def load_of(world: World, choices: str, client: int, again: bool) -> Load:
    """The load of `client` under the controllers' `choices`; `again` says that it took part before.

    Of codecs whose bytes depend on values the lengths of shapes alone count, as in `fedsplit plan`; blocks that are
    alike are coded once.
    """
    codecs = of_shapes_alone(codecs_for(world, choices))

    def coded(stream: Stream, groups: Groups) -> int:
        name = (stream, again, tuple(codecs[stream]))
        known = world.memo.setdefault("coded", {})
        if name not in known:
            known[name] = sum(frame_bytes(codecs, stream, group, again) * times for group, times in groups)
        return int(known[name])

    parameters = _alike(world)
    steps = {stream: coded(stream, [({"x": x.expand(MANY, *x.shape[1:])}, 1)]) / MANY for stream, x in _crossing(world)}
    config, flops = world.config, world.flops
    each, at_server = client_share(world)
    rate = config.devices.server_flops_per_s
    phases = sum(phase.epochs for phase in config.pieces("local.phases"))
    return Load(
        down_bytes=coded("parameters-down", parameters),
        up_bytes=coded("parameters-up", parameters),
        fixed_flops=flops.local * phases * len(world.shards[client]),
        sample_flops=each - (flops.kept if world.cache is not None else 0),
        sample_down_bytes=sum(size for stream, size in steps.items() if stream.endswith("-down")),
        sample_up_bytes=sum(size for stream, size in steps.items() if stream.endswith("-up")),
        server_s=at_server / rate if rate else 0.0,
        messages=len(steps),
    )


def _alike(world: World) -> Groups:
    """The client's parameters: of those whose names differ by numbers and whose shapes are equal one, and how many."""
    if "alike" not in world.memo:
        found: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for name, parameter in world.client.items():
            found.setdefault((re.sub(r"\d+", "", name), tuple(parameter.shape)), []).append(name)
        world.memo["alike"] = [({names[0]: world.client[names[0]]}, len(names)) for names in found.values()]
    groups: Groups = world.memo["alike"]
    return groups


def _crossing(world: World) -> list[tuple[Stream, Tensor]]:
    """The tensors (1, N, C) of one sample that cross the wire in a split step, on the meta device, by stream."""
    if "crossing" not in world.memo:
        world.memo["crossing"] = _find_crossing(world)
    found: list[tuple[Stream, Tensor]] = world.memo["crossing"]
    return found


def _find_crossing(world: World) -> list[tuple[Stream, Tensor]]:
    if world.config.cut.shape == "none":
        return []
    size = world.backbone.image_size
    parts: Any = world.parts
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        h = parts.front(torch.zeros(1, 3, size, size, device=world.device))
        z = parts.body(h)
    up, down = (x.to("meta") for x in (h, h[:, world.open]))
    front = bool(world.trains.front)
    if world.config.cut.shape == "vanilla":
        return [("activations-up", up), *([("gradients-down", down)] if front else [])]  # type: ignore[list-item]
    found: list[tuple[Stream, Tensor]] = [("activations-up", up), ("activations-down", z.to("meta"))]
    if front or world.trains.body:
        found.append(("gradients-up", z.to("meta")))
    return found + ([("gradients-down", down)] if front else [])
