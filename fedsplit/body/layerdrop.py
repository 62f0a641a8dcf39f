"""Layer dropout: whole blocks of the body are left out, drawn anew for every micro-batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit import rng
from fedsplit.body.ask import Ask
from fedsplit.types import FedsplitError, Op, knob

SHAPES = ("increasing", "uniform", "decreasing", "bell")
CAP = 0.95  # no block is dropped more often than this unless the mean rate itself asks for it


@dataclass(frozen=True)
class LayerDrop:
    """Leaves whole blocks out of a micro-batch: no forward pass, no backward pass, nothing stored.

    Paper: arXiv 2503.10217 (DropPEFT); shapes over depth also arXiv 1603.09382 (stochastic depth).
    Place: body.plans.
    Off: rate = 0.
    Deviates: its public text gives neither the form of the shapes nor the rescaling. Here the increasing
        shape is linear, P_l = 2 rate (l - 1) / (n - 1) over the n blocks that may be planned; a fixed number
        of blocks is dropped, since independent draws (count = "bernoulli", the paper's) do not bound the
        peak memory; the ends of the body run always (keep) and the last rounds run in full (recover).
    """

    rate: float = knob(0.5, "mean fraction of the body's blocks that is dropped; 0 is off", low=0.0, high=1.0)
    shape: str = knob("increasing", "how the rate changes from the first block of the body to its last", choices=SHAPES)
    count: str = knob(
        "fixed",
        "blocks dropped from a micro-batch: a 'fixed' number, or 'bernoulli', each block by itself",
        choices=("fixed", "bernoulli"),
    )
    keep: str = knob(
        "both",
        "blocks of the body that are never dropped: none, the first, the last, or both (of two blocks only the first)",
        choices=("none", "first", "last", "both"),
    )
    rescale: str = knob(
        "none",
        "'inverse' multiplies what a block adds by the number of blocks over those that run",
        choices=("none", "inverse"),
    )
    recover: float = knob(0.1, "fraction of the rounds, the last ones, in which every block runs", low=0.0, high=1.0)

    def __post_init__(self) -> None:
        if self.rate >= 1:
            raise FedsplitError(f"rate={self.rate:g} leaves no block; give less than 1.")

    def plan(self, ask: Ask, key: int) -> Tensor:
        """The operations (M, L, U) int8: dropped blocks SKIP, all others FULL; row m is drawn from stream (key, m).

        With a fixed count each micro-batch drops `dropped(n)` blocks; its number is rounded, so a small rate
        of few blocks may be 0. More than may be dropped is cut down to that; `check` refuses it.
        """
        ops = torch.full((ask.micro_batches, ask.depth, ask.units), int(Op.FULL), dtype=torch.int8)
        n, fixed = len(ask.blocks), self.count == "fixed"
        if not self.rate or not n or self.recovers(ask.round, ask.rounds):
            return ops
        chances = rates(self.shape, self.dropped(n) / n if fixed else self.rate, n, self.keep)
        blocks = torch.tensor(ask.blocks)
        for m in range(ask.micro_batches):
            stream = rng.key(key, m)
            drawn = draw_fixed(chances, self.dropped(n), stream) if fixed else draw_bernoulli(chances, stream)
            ops[m, blocks[drawn]] = int(Op.SKIP)
        return ops

    def scale(self, ask: Ask, ops: Tensor) -> Tensor:
        """What each block's branch is multiplied by, (M, L) float32, for the operations `ops` (M, L, U).

        "none" is fairseq's LayerDrop (arXiv 1909.11556): 1 in training and in evaluation. "inverse" multiplies
        every block that may be planned and runs by n / (how many of the n run in this micro-batch): the blocks
        that run weigh as much as all n would if they added alike; no other block is touched. Stochastic depth
        (arXiv 1603.09382) multiplies in evaluation instead, by each block's survival rate; timm's DropPath
        divides by that rate in training. Neither is done here: evaluation is the full model, unscaled.
        """
        factors = torch.ones(ops.shape[:2])
        if self.rescale == "inverse" and ask.blocks:
            blocks = torch.tensor(ask.blocks)
            runs = (ops[:, blocks] != int(Op.SKIP)).any(dim=2)
            inverse = len(blocks) / runs.sum(dim=1, keepdim=True).clamp(min=1)
            factors[:, blocks] = torch.where(runs, inverse, 1.0)
        return factors

    def recovers(self, round: int, rounds: int) -> bool:
        """Whether round `round` (from 1) of `rounds` belongs to the last ones, in which every block runs."""
        return round > rounds - _nearest(self.recover * rounds)

    def dropped(self, n: int) -> int:
        """How many of `n` blocks a micro-batch drops with a fixed count: the rate, rounded, cut to what may be."""
        return min(_nearest(self.rate * n), _most(n, self.keep))

    def check(self, ask: Ask) -> None:
        """Refuses a rate that asks for more blocks than may be dropped; `plan` would drop fewer.

        Raises:
            FedsplitError: with the largest rate that can be had.
        """
        n = len(ask.blocks)
        fixed = self.count == "fixed"
        wanted = _nearest(self.rate * n) if fixed else self.rate * n
        most = _most(n, self.keep) if fixed else len(droppable(n, self.keep))
        if self.rate and not most:
            raise FedsplitError(
                f"none of the body's {n} block{'s' * (n != 1)} may be dropped; "
                "give it more by a lower cut.front or cut.tail, or set rate=0."
            )
        if wanted > most + 1e-9:
            raise FedsplitError(
                f"rate={self.rate:g} would drop {wanted:.3g} of {n} blocks, of which only {most} may be; "
                f"give at most rate={math.floor(100 * most / n) / 100:g}"
                + (" or keep fewer blocks." if self.keep != "none" else ".")
            )


def droppable(n: int, keep: str) -> range:
    """The positions among `n` blocks that may be dropped; of two blocks `keep="both"` keeps the first only.

    Of a lone block none: a body with blocks never runs without any.
    """
    start = 1 if keep in ("first", "both") else 0
    stop = n - 1 if keep == "last" or (keep == "both" and n > 2) else n
    return range(start, stop) if n > 1 else range(0)


def rates(shape: str, rate: float, n: int, keep: str = "none") -> Tensor:
    """The drop rates (n,) float64 of `n` blocks in a row: their mean is `rate`, kept blocks have 0.

    With l from 1 to n: increasing 2 rate (l - 1) / (n - 1), decreasing its mirror, uniform rate, bell
    2 rate sin^2(pi (l - 1/2) / n). What kept blocks leave is made up for by the others, in proportion to
    their rates. A rate above 0.95, or above the mean of those that may be dropped where that is more, is
    capped there, and what the cap cuts off goes to the rest in the same way (evenly where they are all 0).
    So the mean holds wherever those that may be dropped can reach it; where they cannot, each has 1.
    """
    found = torch.zeros(n, dtype=torch.float64)
    free = droppable(n, keep)
    if len(free):
        mean = min(1.0, rate * n / len(free))
        found[free.start : free.stop] = _levelled(_weights(shape, n)[free.start : free.stop], mean, max(CAP, mean))
    return found


def draw_fixed(chances: Tensor, count: int, key: int) -> Tensor:
    """`count` positions (count,) int64 without repetition, position l with probability `chances[l]`.

    `chances` (n,) add up to `count`. Systematic sampling in random order (Madow, 1949): the chances are laid
    end to end in a shuffled order, and the points u, u + 1, ..., u + count - 1 with one uniform u take the
    positions that they fall into. Each is taken with exactly its chance, since none is longer than 1.
    """
    possible = chances.nonzero().flatten()
    if len(possible) == count:
        return possible
    source = rng.torch_rng(key)
    order = possible[torch.randperm(len(possible), generator=source)]
    ends = chances[order].cumsum(0)
    # u has 24 bits, so that u + count - 1 stays below count in float64.
    points = torch.rand((), generator=source).double() + torch.arange(count)
    return order[torch.searchsorted(ends / ends[-1] * count, points, right=True)]


def draw_bernoulli(chances: Tensor, key: int) -> Tensor:
    """Positions int64, each by itself with probability `chances[l]` (n,), but never all of them.

    Where all were drawn, the one that came nearest to staying stays: the largest uniform minus its chance.
    """
    uniform = torch.rand(len(chances), generator=rng.torch_rng(key), dtype=torch.float64)
    drawn = uniform < chances
    if drawn.all():
        drawn[(uniform - chances).argmax()] = False
    return drawn.nonzero().flatten()


def _weights(shape: str, n: int) -> Tensor:
    """The shape (n,) float64 between 0 and 1, with mean 1/2."""
    line = torch.linspace(0.0, 1.0, n, dtype=torch.float64)
    if shape == "bell":
        return torch.sin(math.pi * (torch.arange(n, dtype=torch.float64) + 0.5) / n) ** 2
    return {"increasing": line, "decreasing": line.flip(0), "uniform": torch.full_like(line, 0.5)}[shape]


def _levelled(weights: Tensor, mean: float, cap: float) -> Tensor:
    """min(cap, a weights) (n,) with the `a` that gives them `mean`, which is at most `cap`."""
    line = torch.full_like(weights, cap)
    below = torch.ones_like(weights, dtype=torch.bool)
    while below.any():
        left = max(0.0, mean * len(weights) - cap * int((~below).sum()))
        part = weights[below]
        line[below] = left * part / part.sum() if part.any() else left / len(part)
        over = below & (line > cap)
        if not over.any():
            break
        line[over] = cap
        below &= ~over
    return line


def _most(n: int, keep: str) -> int:
    """How many of `n` blocks may be dropped at once."""
    return min(len(droppable(n, keep)), max(0, n - 1))


def _nearest(number: float) -> int:
    return round(number)  # a method's argument `round` hides the built-in
