"""The body in this process: the server's side of one client's steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsplit.front.vit import Part
from fedsplit.metrics.memory import Meter
from fedsplit.optim import PartOptimizer
from fedsplit.step import score
from fedsplit.tail.losses import cross_entropy
from fedsplit.types import ORDINARY, FedsplitError, Order, Tensors
from fedsplit.wire.link import Link


@dataclass
class LocalBody:
    """Body (and, when vanilla, tail) with its optimiser and its end of the wire.

    `trains` says whether a parameter here trains, `client_trains` whether the client's front waits
    for a gradient, and `open` which of its tokens do; with neither, no graph is kept. `metrics` score the
    units of a probed step. The optimiser `forgets` its moments after each step, if so; where all steps are
    `alike`, only the first one's memory is measured.
    """

    body: Part
    tail: Part | None
    link: Link
    optimizer: PartOptimizer
    trains: bool
    client_trains: bool
    open: slice = field(default_factory=lambda: slice(None))
    metrics: Sequence[str] = ()
    forgets: bool = False
    alike: bool = False
    meter: Meter = field(default_factory=Meter)
    steps: int = 0
    _order: Order = field(default=ORDINARY, repr=False)
    _u: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    _v: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)

    def forward(self, activations: bytes, noise: int) -> bytes:
        """Activations (B, N, C) through the body; the graph stays here until `backward`."""
        self._u = self._receive(activations)["x"]
        with torch.set_grad_enabled(self.trains or self.client_trains), self.meter:
            self._v = self.body(self._u, noise, self._order.plan)
        return self.link.encode("activations-down", {"x": self._v})

    def backward(self, gradients: bytes) -> bytes:
        """Gradient (B, N, C) at the output in, gradient at the cut out; the body learns on the way."""
        self.optimizer.zero_grad()
        gradient = self.link.decode("gradients-up", gradients, {"x": self._v.shape})["x"].to(self._v.device)
        if self._v.requires_grad:
            torch.autograd.backward([self._v], [gradient])
        return self._finish()

    def learn(self, activations: bytes, noise: int) -> tuple[bytes, float]:
        """Vanilla split: forward, loss and backward in one exchange."""
        assert self.tail is not None
        self.optimizer.zero_grad()
        received = self._receive(activations)
        self._u = received["x"]
        with torch.set_grad_enabled(True), self.meter:
            tokens = self.body(self._u, noise, self._order.plan)
            loss = cross_entropy(self.tail(tokens, noise, self._order.plan), received["labels"])
        if loss.requires_grad:
            loss.backward()
        return self._finish(), loss.item()

    def _receive(self, frame: bytes) -> dict[str, Tensor]:
        if self.steps:
            self.meter.close() if self.alike else self.meter.turn()
        self.steps += 1
        device = next((p.device for p in self.body.parameters()), torch.device("cpu"))
        if self.tail is not None:
            device = next(self.tail.parameters()).device
        decoded = self.link.decode("activations-up", frame)
        if "x" not in decoded or decoded["x"].ndim != 3:
            raise FedsplitError("The activations that arrived are not tokens (B, N, C); the client is another version.")
        self._order = Order.read(decoded)
        received: Tensors = {name: decoded[name].to(device) for name in ("x", "labels") if name in decoded}
        received["x"].requires_grad_(self.client_trains)
        return received

    def _finish(self) -> bytes:
        parts = [part for part in (self.body, self.tail) if part is not None]
        found = {}
        if self._order.probe:
            scores = score(parts, self._order, self.metrics)
            found = {f"score.{metric}": values for metric, values in scores.items()}
        plan = self._order.plan
        idle = {name: place for part in parts for name, place in part.idle(plan).items()} if plan else {}
        self.optimizer.step(idle)
        if self.forgets:
            self.optimizer.forget()
        if self.client_trains and self._u.grad is not None:
            found["x"] = self._u.grad[:, self.open]
        return self.link.encode("gradients-down", found) if found else b""
