"""FLOPs of one sample in one training step, by torch's own counter on tensors without data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedsplit.front.vit import Part, Reads, Start, shortcut, split
from fedsplit.types import Cut

T = TypeVar("T")


@dataclass(frozen=True)
class StepFlops:
    """FLOPs per sample (a multiply and an add are two), by part.

    `front`, `body` and `tail` are those of a split step, forward and backward. The backward pass is
    counted for what trains: nothing runs below the lowest trained parameter. `local` is a step of front
    and tail without the body, `score` its forward pass; `kept` is what a kept front output saves of
    any of these.
    """

    front: int
    body: int
    tail: int
    local: int = 0
    score: int = 0
    kept: int = 0

    @property
    def total(self) -> int:
        """All three parts of a split step."""
        return self.front + self.body + self.tail


def step_flops(
    vit: nn.Module,
    cut: Cut,
    image_size: int,
    pool: str = "tail",
    reads: Reads = "tokens",
    start: Start = "images",
) -> StepFlops:
    """Count one sample's training step with the parameters that now require gradients.

    Attention is counted as its two matrix products, whichever kernel runs; recomputation inside
    fused kernels is not counted.
    """
    ghost = counting_copy(vit)
    parts = split(ghost, cut, pool)
    x = torch.empty(1, 3, image_size, image_size, device="meta")
    front_trains = any(p.requires_grad for p in parts.front.named().values())
    body_trains = any(p.requires_grad for p in parts.body.named().values())
    forward: dict[str, int] = {}

    def run(name: str, part: Part, x: Tensor, train: bool) -> Tensor:
        out: Tensor
        with torch.set_grad_enabled(train):
            out, forward[name] = count(lambda: part(x))
        return out

    h = run("front", parts.front, x, front_trains)
    u = h.detach().requires_grad_(front_trains)
    v = run("body", parts.body, u, front_trains or body_trains)
    w = v.detach().requires_grad_(front_trains or body_trains)
    logits = run("tail", parts.tail, w, True)
    guess = run("short", shortcut(ghost, cut, parts, reads), h.detach().requires_grad_(front_trains), True)
    outputs = (("tail", logits), ("body", v), ("front", h), ("short", guess))
    back = {name: _backward(out) for name, out in outputs}
    front, body, tail = (forward[name] + back[name] for name in ("front", "body", "tail"))
    kept = {"images": 0, "cut": forward["front"]}.get(start)
    return StepFlops(
        front,
        body,
        tail,
        local=front + forward["short"] + back["short"],
        score=forward["front"] + forward["short"],
        kept=count(lambda: parts.front.begin(x))[1] if kept is None else kept,
    )


def _backward(out: Tensor) -> int:
    if not out.requires_grad:
        return 0
    return count(lambda: torch.autograd.backward([out], [torch.empty_like(out)]))[1]


def counting_copy(vit: nn.Module) -> nn.Module:
    """A copy of `vit` without data whose attention is two matrix products, in training mode."""
    ghost = copy.deepcopy(vit).to("meta")
    for module in ghost.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
        module.__dict__.pop("compiled", None)  # it would run the block that it was made of
    ghost.train()
    return ghost


def count(work: Callable[[], T]) -> tuple[T, int]:
    """What `work` returns, and the FLOPs that it took."""
    with FlopCounterMode(display=False) as counter:
        result = work()
    return result, int(counter.get_total_flops())
