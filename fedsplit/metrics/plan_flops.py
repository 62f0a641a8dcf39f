"""FLOPs that a plan leaves out, by torch's own counter on blocks without data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.body.ops import execute, units
from fedsplit.front.vit import EMBEDDING, Part, split
from fedsplit.metrics.flops import count, counting_copy
from fedsplit.types import Cut, Op, Plan

Row = tuple[int, ...]


class PlanFlops:
    """What blocks cost by their ops, per sample of a training step, with the parameters that now train.

    Every kind of block is run once per number of FULL and FORWARD units, on tensors without data. As in a
    step, nothing runs backward below the lowest parameter that trains. `planned` are the global numbers of the
    blocks that may be planned, all if left out.
    """

    def __init__(
        self, vit: nn.Module, cut: Cut, image_size: int, shape: str, planned: Sequence[int] | None = None
    ) -> None:
        self._vit, self._cut, self._image_size, self._shape = vit, cut, image_size, shape
        self._planned = range(cut.depth) if planned is None else planned
        self._known: dict[tuple[Any, ...], tuple[int, bool]] = {}

    @cached_property
    def units(self) -> int:
        """U: units of a planned block, 1 where those cannot be sliced or (pruned) have unequal numbers of them."""
        found = {units(self._blocks[number]) for number in self._planned}
        return found.pop() if len(found) == 1 else 1

    def spared(self, plan: Plan | None) -> tuple[int, int]:
        """FLOPs at the client and at the server that a step by `plan` leaves out of one in full."""
        if plan is None:
            return 0, 0
        done = {"client": 0, "server": 0}
        for side, _, flops in self._walk(plan):
            done[side] += flops
        return self._whole["client"] - done["client"], self._whole["server"] - done["server"]

    @cached_property
    def table(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of every block, (L,) int64: one unit forward alone, one unit in full alone, all units in full."""
        found = []
        for number, low in enumerate(self._lows):
            alone = (0,) * (self.units - 1) if units(self._blocks[number]) == self.units else ()
            rows = ((Op.FORWARD, *alone), (Op.FULL, *alone), (Op.FULL,) * (1 + len(alone)))
            found.append([self._cost(number, tuple(map(int, row)), low)[0] for row in rows])
        forward, full, whole = torch.tensor(found, dtype=torch.int64).T
        return forward, full, whole

    @cached_property
    def _parts(self) -> Any:
        return split(counting_copy(self._vit), self._cut)

    @cached_property
    def _blocks(self) -> list[nn.Module]:
        return [part.block(number) for part in self._order for number in part.numbers]

    @property
    def _order(self) -> tuple[Part, Part, Part]:
        return self._parts.front, self._parts.body, self._parts.tail

    @cached_property
    def _starts(self) -> tuple[bool, bool, bool]:
        """Whether the input of each part's first block waits for a gradient."""
        front, body, _ = ([n for n, p in part.named().items() if p.requires_grad] for part in self._order)
        embeds = any(name.startswith(EMBEDDING) for name in front)
        undone = any(name.startswith("unguard.") for name in body)  # before the body's first block
        return embeds, bool(front) or undone, bool(front or body)

    @cached_property
    def _full(self) -> Plan:
        return Plan(((int(Op.FULL),),) * self._cut.depth)

    @cached_property
    def _whole(self) -> dict[str, int]:
        whole = {"client": 0, "server": 0}
        for side, _, flops in self._walk(self._full):
            whole[side] += flops
        return whole

    @cached_property
    def _lows(self) -> list[bool]:
        return [low for _, low, _ in self._walk(self._full)]

    @property
    def _guarded(self) -> int:
        """Tokens that the guards at the cut add."""
        guards: Any = getattr(self._parts.front._shell, "guard", ())
        return sum(guard.adds for guard in guards)

    @cached_property
    def _tokens(self) -> list[int]:
        """Tokens (N,) before each block, prompts included."""
        front = self._parts.front
        image = torch.empty(1, 3, self._image_size, self._image_size, device="meta")
        with torch.no_grad():
            tokens = front.embed(image).shape[1]
        first = getattr(front._shell.norm_pre, "prompt", None)
        tokens += 0 if first is None else first.adds
        found = []
        for number, block in enumerate(self._blocks):
            tokens += self._guarded if number == self._cut.front else 0
            tokens += getattr(getattr(block, "prompt_before", None), "adds", 0)
            found.append(tokens)
            tokens += getattr(getattr(block, "prompt_after", None), "adds", 0)
        return found

    def _walk(self, plan: Plan) -> Iterator[tuple[str, bool, int]]:
        """Of every block: its side, whether its input waits for a gradient, its FLOPs."""
        server = (False, True, self._shape == "vanilla")
        for part, low, remote in zip(self._order, self._starts, server, strict=True):
            for number in part.numbers:
                before = getattr(part.block(number), "prompt_before", None)
                low = low or (before is not None and before.tokens.requires_grad)
                flops, above = self._cost(number, plan.row(number), low)
                yield "server" if remote else "client", low, flops
                low = above

    def _cost(self, number: int, row: Row, low: bool) -> tuple[int, bool]:
        """FLOPs of a block, and whether its output waits for a gradient; all units are alike if they divide."""
        block = self._blocks[number]
        alike = _hidden(block) % max(1, len(row)) == 0
        kind = tuple((name, tuple(p.shape), p.requires_grad) for name, p in block.named_parameters())
        known = (kind, self._tokens[number], tuple(sorted(row)) if alike else row, low)
        if known not in self._known:
            x = torch.empty(1, self._tokens[number], self._width, device="meta").requires_grad_(low)
            out, forward = count(lambda: execute(block, x, row))
            waits = out.requires_grad
            back = 0
            if waits and out is not x:
                back = count(lambda: torch.autograd.backward([out], [torch.empty_like(out)]))[1]
            self._known[known] = (forward + back, waits)
        return self._known[known]

    @property
    def _width(self) -> int:
        return int(self._parts.front._shell.embed_dim)


def _hidden(block: Any) -> int:
    fc2 = getattr(getattr(block, "mlp", None), "fc2", None)
    return int(getattr(fc2, "in_features", 0))
