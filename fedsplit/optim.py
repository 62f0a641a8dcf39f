"""The optimiser of one side of the split: client parts or server part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.settings import Optimizer
from fedsplit.types import Tensors

Watch = Callable[[Mapping[str, nn.Parameter]], None]


class PartOptimizer:
    """An optimiser over named parameters, whose state can be taken out and put back as tensors.

    `pulls` are proximal pieces: each adds `pull(parameter, anchor)` to a gradient, where the anchor is
    the parameter as the round began. `watch` sees the parameters right before each step, with the
    gradients of the loss alone.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        settings: Optimizer,
        lr: float,
        pulls: Sequence[Any] = (),
        watch: Watch | None = None,
    ) -> None:
        self.watch = watch
        self.named = dict(named)
        self.pulls = tuple(pulls)
        self.anchors = {name: p.detach().clone() for name, p in self.named.items()} if pulls else {}
        self._inner = _make(list(self.named.values()), settings, lr) if self.named else None

    def zero_grad(self) -> None:
        """Forget the gradients; a parameter that gets none is not moved."""
        for parameter in self.named.values():
            parameter.grad = None

    def step(self, idle: Mapping[str, tuple[int, Tensor]] | None = None) -> None:
        """One update with the gradients at hand.

        `idle` names entries of parameters, by dimension and positions along it, that neither move nor
        gather moments: a gradient of zero is not enough, since momentum and decay act without one.
        """
        if self._inner is None:
            return
        if self.watch is not None:
            self.watch(self.named)
        for name, anchor in self.anchors.items():
            parameter = self.named[name]
            if parameter.grad is not None:
                for pull in self.pulls:
                    parameter.grad.add_(pull.gradient(parameter.detach(), anchor))
        held = {n: (dim, at.to(self.named[n].device)) for n, (dim, at) in (idle or {}).items() if n in self.named}
        before = {name: self._entries(name, *place) for name, place in held.items()}
        self._inner.step()
        for name, (dim, positions) in held.items():
            for slot, value in self._slots(name).items():
                old = before[name].get(slot)
                value.index_fill_(dim, positions, 0) if old is None else value.index_copy_(dim, positions, old)

    def _slots(self, name: str) -> Tensors:
        """The parameter's values, as slot "", and its moments: all of its shape."""
        assert self._inner is not None
        parameter = self.named[name]
        moments = self._inner.state.get(parameter, {}).items()
        same = {slot: x for slot, x in moments if isinstance(x, Tensor) and x.shape == parameter.shape}
        return {"": parameter.detach(), **same}

    def _entries(self, name: str, dim: int, positions: Tensor) -> Tensors:
        return {slot: value.index_select(dim, positions) for slot, value in self._slots(name).items()}

    def forget(self) -> None:
        """Start anew, without moments."""
        if self._inner is not None:
            self._inner.state.clear()

    def state(self) -> Tensors:
        """Moments and step counts, as `<parameter>|<slot>`."""
        if self._inner is None:
            return {}
        return {
            f"{name}|{slot}": value
            for name, parameter in self.named.items()
            for slot, value in self._inner.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def load(self, state: Tensors) -> None:
        """Put back what `state` gave."""
        if self._inner is None:
            return
        for entry, value in state.items():
            name, _, slot = entry.rpartition("|")
            parameter = self.named[name]
            place = "cpu" if slot == "step" else parameter.device
            self._inner.state[parameter][slot] = value.to(place)

    def state_bytes(self) -> int:
        """Memory of the moments, in bytes."""
        return sum(value.nbytes for value in self.state().values())


def _make(parameters: list[nn.Parameter], settings: Optimizer, lr: float) -> torch.optim.Optimizer:
    if settings.name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    kind: type[torch.optim.Adam] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.name]
    return kind(parameters, lr=lr, betas=(settings.momentum, 0.999), weight_decay=settings.weight_decay)
