"""What of a client's parameters is shared, and what stays its own (`share.partial`).

After its round a client sends what it shares. It keeps the rest: the client's side in its memory, the
server's side in the server's notes on it. When it comes again it takes what it shared from the server
and its own last copy of the rest; the first time it takes everything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from fedsplit.metrics.quality import evaluate
from fedsplit.types import FedsplitError, Tensors
from fedsplit.wire.frame import pack, unpack
from fedsplit.world import World, values_of

OWN = "own|"
"""In a client's memory: its value of a parameter that it did not share."""
AWAY = "away|"
"""In the notes: a parameter on the client's side that the client did not share."""


class Importance:
    """The sum of squared gradients of each block over a client's round, on one side, in float64.

    One is the `watch` of that side's optimisers.
    """

    def __init__(self) -> None:
        self.sums: dict[int, float] = {}

    def __call__(self, named: Mapping[str, nn.Parameter]) -> None:
        """Add the gradients at hand."""
        for name, parameter in named.items():
            number = block_of(name)
            if number is not None and parameter.grad is not None:
                square = parameter.grad.detach().double().square().sum().item()
                self.sums[number] = self.sums.get(number, 0.0) + square


def block_of(name: str) -> int | None:
    """The number of the block that a parameter belongs to; None for prompts and whatever is in no block."""
    words = name.split(".")
    return int(words[1]) if words[0] == "blocks" and "prompt" not in name else None


def watches(world: World) -> tuple[Importance | None, Importance | None]:
    """For the client's and the server's side of a round: what sums the gradients, where a piece reads them."""
    reads = any(piece.uses_gradients for piece in world.config.pieces("share.partial"))
    return (Importance(), Importance()) if reads else (None, None)


def withheld(world: World, names: Iterable[str], seen: Importance | None = None) -> frozenset[str]:
    """Those of one side's parameters that a client does not share after a round with the gradients `seen`."""
    pieces = world.config.pieces("share.partial")
    numbers = {name: block_of(name) for name in names}
    blocks = sorted({number for number in numbers.values() if number is not None})
    sums = seen.sums if seen else {}
    importance = torch.tensor([sums.get(number, 0.0) for number in blocks], dtype=torch.float64)
    shared = frozenset(blocks)
    for piece in pieces:
        shared &= piece.shared(importance, blocks, world.cut.depth)
    head = all(piece.head == "shared" for piece in pieces)
    return frozenset(name for name, number in numbers.items() if not (head if number is None else number in shared))


def may_withhold(world: World) -> frozenset[str]:
    """All parameters, of both sides, that some client may keep to itself after some round."""
    found: frozenset[str] = frozenset()
    for side in (world.client, world.server):
        found |= withheld(world, side)
        if any(piece.uses_gradients for piece in world.config.pieces("share.partial")):
            found |= {name for name in side if block_of(name) is not None}
    return found


def foreseen(world: World) -> bool:
    """Whether it is known before a run how many bytes the client's shared parameters take.

    It is where gradients do not decide, or where all blocks of the client weigh and are written alike.
    """
    if not any(piece.uses_gradients for piece in world.config.pieces("share.partial")):
        return True
    blocks: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    for name, parameter in world.client.items():
        number = block_of(name)
        if number is not None:
            leaf = name.removeprefix(f"blocks.{number}.")
            blocks.setdefault(number, []).append((leaf, tuple(parameter.shape)))
    kinds = {(len(str(number)), tuple(leaves)) for number, leaves in blocks.items()}
    return len(kinds) < 2


def check(world: World) -> None:
    """Whether the schedule lets clients keep parameters of their own.

    Raises:
        FedsplitError: clients take turns at one model.
    """
    schedule = world.config.server.schedule
    if schedule != "splitfed-v1" and may_withhold(world):
        raise FedsplitError(
            f"share.partial needs a model for every client, but with server.schedule={schedule} they take turns "
            "at one; set server.schedule=splitfed-v1."
        )


def divided(world: World, parameters: Mapping[str, nn.Parameter], seen: Importance | None) -> tuple[Tensors, Tensors]:
    """The values of one side's parameters after a round: those shared, and those that stay the client's own."""
    own = withheld(world, parameters, seen)
    values = values_of(parameters)
    return (
        {name: value for name, value in values.items() if name not in own},
        {name: value for name, value in values.items() if name in own},
    )


def own(memory: bytes) -> Tensors:
    """The client's own parameters in what it wrote down."""
    return {name.removeprefix(OWN): value for name, value in unpack(memory).items() if name.startswith(OWN)}


def own_at_server(notes: bytes) -> Tensors:
    """The server's parameters for this client alone in the notes on it."""
    return {name: value for name, value in unpack(notes).items() if "|" not in name}


def away(notes: bytes) -> frozenset[str]:
    """The names of the client's own parameters, as the server knows them from its last update."""
    return frozenset(name.removeprefix(AWAY) for name in unpack(notes) if name.startswith(AWAY))


def write_notes(at_server: Tensors, missing: Collection[str], wire: Tensors) -> bytes:
    """The notes on a client whose update lacked `missing`, with the server's parameters for it alone.

    `wire` is what the server's end of the wire to it remembers.
    """
    return pack(at_server | {f"{AWAY}{name}": torch.empty(0) for name in sorted(missing)} | wire)


def for_the_body(notes: bytes) -> bytes:
    """Of the notes on a client, those that its server-side part needs: its parameters there."""
    return pack(own_at_server(notes))


def receive(world: World, sent: Tensors, memory: bytes) -> None:
    """Load what the server `sent`, and the client's own copy of the rest.

    Raises:
        FedsplitError: neither holds a parameter that the client trains.
    """
    tensors = {**own(memory), **sent}
    lost = sorted(set(world.client) - set(tensors))
    if lost:
        raise FedsplitError(
            f"The client has no copy of its own parameter '{lost[0]}' any more; start it anew with an empty run folder."
        )
    world.load(tensors)


def accuracy(world: World, client: int) -> float:
    """Accuracy of the model as it is loaded on the held-out samples of `client`."""
    quality = evaluate(
        world.parts,
        world.data.train,
        world.held_out[client],
        len(world.data.classes),
        batch_size=world.config.eval.batch_size,
        **world.look,
    )
    return quality.accuracy
