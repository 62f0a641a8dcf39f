"""Guards: what the client does to its tokens last of all, right before they cross the wire.

A guard maps tokens (B, N, C), prefix tokens and prompts among them, to what is sent; it acts in training and in
evaluation alike, as the deployed device does. Several act in the order of `front.edits`. What must be undone at the
server (`unguard`) is the first that the body does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.rng import torch_rng
from fedsplit.types import Cut, FedsplitError


class Guard(nn.Module):
    """A module at the end of the front. `draws` says whether it draws at random: its output is then never kept.

    In training the draws come from torch's own generator, which the front seeds for every guard by its name; in
    evaluation from `stream`, the same for every batch. Both are on the CPU, so that every device agrees. `adds` is
    how many tokens more it sends than it is given.
    """

    draws = False
    adds = 0

    def __init__(self, stream: int = 0) -> None:
        super().__init__()
        self.stream = stream
        self.quiet = False

    @property
    def source(self) -> torch.Generator:
        """Where the next draws come from."""
        return torch.default_generator if self.training else torch_rng(self.stream)

    def forward(self, x: Tensor) -> Tensor:
        """What is sent for tokens `x` (B, N, C)."""
        return x if self.draws and self.quiet else self.act(x)

    def act(self, x: Tensor) -> Tensor:
        """What a guard that is not quiet sends for tokens `x` (B, N, C)."""
        raise NotImplementedError


@contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """Inside, the guards in `module` that draw at random leave their tokens as they are; the others act as ever.

    For noise and dropout that is the expectation of what is sent. It is what an attacker who knows the front can
    differentiate through.
    """
    guards = [part for part in module.modules() if isinstance(part, Guard)]
    before = [guard.quiet for guard in guards]
    for guard in guards:
        guard.quiet = True
    try:
        yield
    finally:
        for guard, was in zip(guards, before, strict=True):
            guard.quiet = was


def put(vit: nn.Module, cut: Cut, name: str, guard: Guard, undo: nn.Module | None = None) -> nn.Module:
    """`vit` with `guard` behind those that it has, at the client; `undo` is the server's.

    Raises:
        FedsplitError: nothing crosses this cut.
    """
    if not cut.body:
        raise FedsplitError(
            f"front.edits={name} guards what crosses the cut, and with cut.shape=none nothing does; "
            f"leave {name} out, or set another cut.shape."
        )
    model: Any = vit
    if not hasattr(model, "guard"):
        model.guard, model.unguard = nn.Sequential(), nn.Sequential()
        # Before prompts of the server's, whichever was put in first.
        model.blocks[cut.front].register_forward_pre_hook(_Crossing(model.guard, model.unguard), prepend=True)
    model.guard.add_module(name, guard)
    if undo is not None:
        model.unguard.add_module(name, undo)
    return vit


def patch_grid(vit: nn.Module) -> tuple[int, int]:
    """Rows and columns of the patch tokens that the guards so far send; they come last."""
    model: Any = vit
    high, wide = getattr(model, "sent_grid", model.patch_embed.grid_size)
    return int(high), int(wide)


@dataclass(frozen=True, eq=False)
class _Crossing:
    """A hook for timm's own forward pass; parts call the guards themselves. A deep copy of the model has its own."""

    guard: nn.Sequential
    unguard: nn.Sequential

    def __call__(self, block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.unguard(self.guard(inputs[0])), *inputs[1:])
