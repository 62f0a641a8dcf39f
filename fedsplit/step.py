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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsplit.front.vit import Part, Start
from fedsplit.metrics.memory import Meter
from fedsplit.optim import PartOptimizer
from fedsplit.rng import key
from fedsplit.tail.losses import cross_entropy
from fedsplit.types import ORDINARY, Batch, Order, Plan, Tensors
from fedsplit.wire.link import Link


class Penalty(Protocol):
    """A term of the front's loss, e.g. against inversion; `memory` is None at first."""

    def penalty(self, front: Part, x: Tensor, h: Tensor, memory: Any, key: int) -> tuple[Tensor, Any]:
        """A scalar for images `x` (B, 3, height, width) and activations `h` (B, N, C), and new memory."""


class Body(Protocol):
    """The server as a client sees it: bytes in, bytes out."""

    def forward(self, activations: bytes, noise: int) -> bytes:
        """Activations down for activations up, by the plan that came with them."""

    def backward(self, gradients: bytes) -> bytes:
        """The gradient at the cut for the gradient at the body's output, and scores if asked; else empty."""

    def learn(self, activations: bytes, noise: int) -> tuple[bytes, float]:
        """Vanilla split: activations and labels up; the gradient at the cut and the loss come back."""


@dataclass
class Client:
    """What a device holds: its parts, its end of the wire, and what must travel back for training.

    `start` says what a batch holds (see `Part`), `open` which of the front's output tokens wait for a
    gradient. `metrics` score the units of a probed step, `heard` holds those scores, (L, U) each.
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
    metrics: Sequence[str] = ()
    heard: Tensors = field(default_factory=dict)

    def embed(self, batch: Batch, noise: int, plan: Plan | None = None) -> tuple[Tensor, Tensor]:
        """Activations (B, N, C) at the cut and the penalty on them; no graph if the front is frozen."""
        with torch.set_grad_enabled(self.front_trains), self.meter:
            h = self.front(batch.x, noise, plan, self.start)
            total = h.new_zeros(())
            for place, piece in enumerate(self.penalties):
                stream = key(noise, "penalty", type(piece).__name__)
                term, self.memory[place] = piece.penalty(self.front, batch.x, h, self.memory.get(place), stream)
                total = total + term
            return h, total

    def loss(self, z: Tensor, labels: Tensor, noise: int, plan: Plan | None = None) -> Tensor:
        """Mean loss of the tail on tokens `z` (B, N, C) for `labels` (B,)."""
        with self.meter:
            return self.criterion(self.tail(z, noise, plan), labels)

    def learn(self, order: Order, returned: Mapping[str, Tensor]) -> None:
        """The optimiser's step, which leaves idle units alone; in a probed step, the scores first."""
        if order.probe:
            self.heard = score((self.front, self.tail), order, self.metrics)
            for metric in self.metrics:
                self.heard[metric] += returned.get(f"score.{metric}", 0)
        plan = order.plan
        self.optimizer.step({**self.front.idle(plan), **self.tail.idle(plan)} if plan else {})


def u_shape_step(client: Client, body: Body, batch: Batch, noise: int, order: Order = ORDINARY) -> float:
    """Labels and loss stay at the client; four tensors cross the wire, two if only the tail trains."""
    client.optimizer.zero_grad()
    h, penalty = client.embed(batch, noise, order.plan)
    up = client.link.encode("activations-up", {"x": h, **order.tensors()})
    down = client.link.decode("activations-down", body.forward(up, noise))
    z = down["x"].to(h.device).requires_grad_(client.front_trains or client.body_trains)
    loss = client.loss(z, batch.y, noise, order.plan)
    if loss.requires_grad:
        loss.backward()
    returned: Tensors = {}
    if z.grad is not None:
        returned = _received(client, body.backward(client.link.encode("gradients-up", {"x": z.grad})), h)
        if client.front_trains:
            _backward(h[:, client.open], returned, penalty)
    client.learn(order, returned)
    return loss.item()


def vanilla_step(client: Client, server: Body, batch: Batch, noise: int, order: Order = ORDINARY) -> float:
    """The server holds body, tail and loss, so labels go up beside the activations."""
    client.optimizer.zero_grad()
    h, penalty = client.embed(batch, noise, order.plan)
    up = client.link.encode("activations-up", {"x": h, "labels": batch.y, **order.tensors()})
    frame, loss = server.learn(up, noise)
    returned = _received(client, frame, h)
    if client.front_trains:
        _backward(h[:, client.open], returned, penalty)
    client.learn(order, returned)
    return loss


def local_step(client: Client, batch: Batch, noise: int, order: Order = ORDINARY) -> float:
    """Nothing crosses the wire: the front is the whole depth (FedAvg), or the body is left out (SFPrompt)."""
    client.optimizer.zero_grad()
    h, penalty = client.embed(batch, noise, order.plan)
    loss = client.loss(h, batch.y, noise, order.plan)
    total: Any = loss + penalty if client.penalties else loss
    if total.requires_grad:
        total.backward()
    client.learn(order, {})
    return loss.item()


def score(parts: Sequence[Part], order: Order, metrics: Sequence[str]) -> Tensors:
    """By metric what the units of `parts` contribute, (L, U), from weights and the gradients now at hand."""
    depth, units = order.probe
    totals = {metric: torch.zeros(depth, units) for metric in metrics}
    for part in parts:
        for metric, found in part.contributions(metrics, depth, units).items():
            totals[metric] += found
    return totals


def _received(client: Client, frame: bytes, h: Tensor) -> Tensors:
    shapes = {"x": h[:, client.open].shape}
    return client.link.decode("gradients-down", frame, shapes) if frame else {}


def _backward(h: Tensor, gradient: Tensors, penalty: Tensor) -> None:
    roots = {h: gradient["x"].to(h.device), penalty: torch.ones_like(penalty)}
    waiting = [root for root in roots if root.requires_grad]  # a plan may have skipped all that trains
    if waiting:
        torch.autograd.backward(waiting, [roots[root] for root in waiting])
