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
        self._settings, self._lr = settings, lr
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
        busy = [
            _Busy(self.named[name], self._inner.state, *place)
            for name, place in (idle or {}).items()
            if name in self.named and self.named[name].grad is not None
        ]
        self._inner.step()
        if busy:
            apart = _make([one.part for one in busy], self._settings, self._lr)
            for one in busy:
                one.lend(apart.state)
            apart.step()
            for one in busy:
                one.take_back(apart.state, self._inner.state)

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


class _Busy:
    """The entries of a parameter that may move, as a parameter of their own: its work is that of its size.

    The parameter loses its gradient, so that its own optimiser passes it by.
    """

    def __init__(self, parameter: nn.Parameter, state: Mapping[Any, Any], dim: int, idle: Tensor) -> None:
        kept = torch.ones(parameter.shape[dim], dtype=torch.bool)
        kept[idle.cpu()] = False
        self.parameter, self.dim = parameter, dim
        self.at = kept.nonzero().flatten().to(parameter.device)
        self.part = nn.Parameter(self._cut(parameter.detach()))
        self.state = {slot: self._cut(value) for slot, value in state.get(parameter, {}).items()}
        assert parameter.grad is not None
        self.part.grad, parameter.grad = self._cut(parameter.grad), None

    def lend(self, state: dict[Any, Any]) -> None:
        """Give the part its moments."""
        if self.state:
            state[self.part] = self.state

    def take_back(self, state: Mapping[Any, Any], whole: dict[Any, Any]) -> None:
        """Put the part and its moments where they came from."""
        self.parameter.detach().index_copy_(self.dim, self.at, self.part.detach())
        for slot, value in state.get(self.part, {}).items():
            if isinstance(value, Tensor) and value.shape == self.part.shape:
                full = whole[self.parameter].setdefault(slot, torch.zeros_like(self.parameter))
                full.index_copy_(self.dim, self.at, value)
            else:
                whole[self.parameter][slot] = value

    def _cut(self, value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.shape == self.parameter.shape
        return value.index_select(self.dim, self.at) if whole else value


def _make(parameters: list[nn.Parameter], settings: Optimizer, lr: float) -> torch.optim.Optimizer:
    if settings.name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    kind: type[torch.optim.Adam] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.name]
    return kind(parameters, lr=lr, betas=(settings.momentum, 0.999), weight_decay=settings.weight_decay)
