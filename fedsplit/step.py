"""START HERE: one training step of a split model, top to bottom.

    client                             |  server
    images ─► front ──activations──►   |  body
              tail  ◄──activations──   |
              loss                     |
              tail  ──gradients────►   |  body, its optimiser
              front ◄──gradients────   |
    optimiser of front and tail        |

Everything that crosses the bar is bytes (`fedsplit.wire`). The server is a `Body`: an object in this
process, or a stream to another machine; this file cannot tell. Axes: B batch, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsplit.front.vit import Part, Start
from fedsplit.metrics.memory import Meter
from fedsplit.optim import PartOptimizer
from fedsplit.rng import key
from fedsplit.tail.losses import cross_entropy
from fedsplit.types import Batch, Op, Tensors
from fedsplit.wire.link import Link

Plan = tuple[Op, ...]


class Penalty(Protocol):
    """A term of the front's loss, e.g. against inversion; `memory` is None at first."""

    def penalty(self, front: Part, x: Tensor, h: Tensor, memory: Any, key: int) -> tuple[Tensor, Any]:
        """A scalar for images `x` (B, 3, height, width) and activations `h` (B, N, C), and new memory."""


class Body(Protocol):
    """The server as a client sees it: bytes in, bytes out."""

    def forward(self, activations: bytes, noise: int, plan: Plan | None) -> bytes:
        """Activations down for activations up."""

    def backward(self, gradients: bytes) -> bytes:
        """The gradient at the cut for the gradient at the body's output; empty if nobody needs it."""

    def learn(self, activations: bytes, noise: int, plan: Plan | None) -> tuple[bytes, float]:
        """Vanilla split: activations and labels up; the gradient at the cut and the loss come back."""


@dataclass
class Client:
    """What a device holds: its parts, its end of the wire, and what must travel back for training.

    `start` says what a batch holds (see `Part`), `open` which of the front's output tokens wait for a
    gradient.
    """

    front: Part
    tail: Part
    link: Link
    optimizer: PartOptimizer
    front_trains: bool
    body_trains: bool
    penalties: Sequence[Penalty] = ()
    start: Start = "images"
    open: slice = field(default_factory=lambda: slice(None))
    criterion: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    memory: dict[int, Any] = field(default_factory=dict)
    meter: Meter = field(default_factory=Meter)

    def embed(self, batch: Batch, noise: int) -> tuple[Tensor, Tensor]:
        """Activations (B, N, C) at the cut and the penalty on them; no graph if the front is frozen."""
        with torch.set_grad_enabled(self.front_trains), self.meter:
            h = self.front(batch.x, noise, start=self.start)
            total = h.new_zeros(())
            for place, piece in enumerate(self.penalties):
                stream = key(noise, "penalty", place)
                term, self.memory[place] = piece.penalty(self.front, batch.x, h, self.memory.get(place), stream)
                total = total + term
            return h, total

    def loss(self, z: Tensor, labels: Tensor, noise: int) -> Tensor:
        """Mean loss of the tail on tokens `z` (B, N, C) for `labels` (B,)."""
        with self.meter:
            return self.criterion(self.tail(z, noise), labels)


def u_shape_step(client: Client, body: Body, batch: Batch, noise: int, plan: Plan | None = None) -> float:
    """Labels and loss stay at the client; four tensors cross the wire, two if only the tail trains."""
    client.optimizer.zero_grad()
    h, penalty = client.embed(batch, noise)
    up = client.link.encode("activations-up", {"x": h})
    down = client.link.decode("activations-down", body.forward(up, noise, plan))
    z = down["x"].to(h.device).requires_grad_(client.front_trains or client.body_trains)
    loss = client.loss(z, batch.y, noise)
    if loss.requires_grad:
        loss.backward()
    if z.grad is not None:
        returned = body.backward(client.link.encode("gradients-up", {"x": z.grad}))
        if client.front_trains:
            _backward(h[:, client.open], client.link.decode("gradients-down", returned), penalty)
    client.optimizer.step()
    return loss.item()


def vanilla_step(client: Client, server: Body, batch: Batch, noise: int, plan: Plan | None = None) -> float:
    """The server holds body, tail and loss, so labels go up beside the activations."""
    client.optimizer.zero_grad()
    h, penalty = client.embed(batch, noise)
    up = client.link.encode("activations-up", {"x": h, "labels": batch.y})
    returned, loss = server.learn(up, noise, plan)
    if client.front_trains:
        _backward(h[:, client.open], client.link.decode("gradients-down", returned), penalty)
        client.optimizer.step()
    return loss


def local_step(client: Client, batch: Batch, noise: int) -> float:
    """Nothing crosses the wire: the front is the whole depth (FedAvg), or the body is left out (SFPrompt)."""
    client.optimizer.zero_grad()
    h, penalty = client.embed(batch, noise)
    loss = client.loss(h, batch.y, noise)
    total: Any = loss + penalty if client.penalties else loss
    if total.requires_grad:
        total.backward()
    client.optimizer.step()
    return loss.item()


def _backward(h: Tensor, gradient: Tensors, penalty: Tensor) -> None:
    roots, gradients = [h], [gradient["x"].to(h.device)]
    if penalty.requires_grad:
        roots, gradients = [h, penalty], [*gradients, torch.ones_like(penalty)]
    torch.autograd.backward(roots, gradients)
