"""An attack's work: descent in steps that shows how far it is, stops, and goes on where it stopped."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EVERY = 200


def _silent(what: str, done: int, total: int) -> None:
    pass


@dataclass
class Work:
    """Where an attack tells its progress and keeps what it has so far.

    `heard(what, done, total)` is called at every step; `path` is the file it goes on from, if any. `spent` are
    the steps that all of its descents took together: the attacker's budget as it was used.
    """

    path: Path | None = None
    heard: Callable[[str, int, int], None] = _silent
    spent: int = 0
    _stage: int = field(default=0, repr=False)

    def descend(
        self,
        what: str,
        parameters: Mapping[str, Tensor],
        loss: Callable[[int], Tensor],
        steps: int,
        make: Callable[[list[Tensor]], torch.optim.Optimizer],
        after: Callable[[], None] | None = None,
        rate: Callable[[int], float] | None = None,
    ) -> None:
        """Take `steps` steps down `loss(step)` over `parameters`, in place, with the optimiser that `make` makes.

        `loss` must depend on the parameters and the step alone, all its draws by a key of the step: a descent that
        was interrupted then ends where it would have. `after` is called after every step, e.g. to clamp.
        `rate(step)` is the factor of the learning rate in that step.
        """
        stage, self._stage = self._stage, self._stage + 1
        leaves = list(parameters.values())
        optimizer = make(leaves)
        full = [group["lr"] for group in optimizer.param_groups]
        first = self._resume(stage, parameters, optimizer)
        for step in range(first, steps):
            if rate is not None:
                for group, lr in zip(optimizer.param_groups, full, strict=True):
                    group["lr"] = lr * rate(step)
            optimizer.zero_grad()
            value = loss(step)
            value.backward()
            optimizer.step()
            if after is not None:
                after()
            self.heard(what, step + 1, steps)
            if self.path is not None and (step + 1) % EVERY == 0 and step + 1 < steps:
                self._keep(stage, step + 1, parameters, optimizer)
        if self.path is not None and first < steps:
            self._keep(stage, steps, parameters, optimizer)
        self.spent += steps

    def repeat(self, what: str, steps: int, act: Callable[[int], None]) -> None:
        """Call `act(step)` `steps` times: for what cannot go on where it stopped, and starts over."""
        self._stage += 1
        for step in range(steps):
            act(step)
            self.heard(what, step + 1, steps)
        self.spent += steps

    def _resume(self, stage: int, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
        file = self._file(stage)
        if file is None or not file.is_file():
            return 0
        kept: dict[str, Any] = torch.load(file, weights_only=True)
        with torch.no_grad():
            for name, value in kept["parameters"].items():
                parameters[name].copy_(value)
        optimizer.load_state_dict(kept["optimizer"])
        return int(kept["step"])

    def _keep(self, stage: int, step: int, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        file = self._file(stage)
        assert file is not None
        scratch = file.with_name(f".{file.name}.new")
        plain = {name: value.detach() for name, value in parameters.items()}
        torch.save({"step": step, "parameters": plain, "optimizer": optimizer.state_dict()}, scratch)
        os.replace(scratch, file)

    def _file(self, stage: int) -> Path | None:
        return None if self.path is None else self.path.with_name(f"{self.path.name}-{stage}.pt")

    def clear(self) -> None:
        """Delete what was kept: the attack has ended."""
        for file in self.path.parent.glob(f"{self.path.name}-*.pt") if self.path else ():
            file.unlink()


def adam(lr: float, *, amsgrad: bool = True, eps: float = 1e-8) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """Adam as the attacks of He, Zhang and Lee (ACSAC 2019) use it, for `Work.descend`."""
    return lambda leaves: torch.optim.Adam(leaves, lr=lr, amsgrad=amsgrad, eps=eps)


def cosine(steps: int) -> Callable[[int], float]:
    """The factor of a learning rate that falls from 1 to 0 over `steps`."""
    return lambda step: (1 + math.cos(math.pi * step / steps)) / 2
