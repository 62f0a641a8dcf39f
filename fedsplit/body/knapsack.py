"""Which units run in full, forward only, or not at all, by knapsacks under a compute or traffic budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from fedsplit import rng
from fedsplit.body import solve
from fedsplit.body.ask import Ask
from fedsplit.body.counting import NEVER, Bools, Floats, Ints, Ops, countable
from fedsplit.body.scores import METRICS as SCORES
from fedsplit.body.unit_costs import Costs
from fedsplit.types import FedsplitError, Op, knob, split_names

METRICS = (*SCORES, "random", "depth")


@dataclass(frozen=True)
class Knapsack:
    """Gives each micro-batch's units FULL, FORWARD or SKIP so that their scores are highest within a budget.

    Paper: D2FT, arXiv 2504.12471: knapsacks, one per device that holds subnets, by backward and forward scores.
    Place: body.plans.
    Off: budget = 1.0, all FULL.
    Deviates: one server holds all units, dealt to `workers`; both ops are chosen jointly and exactly, "bi-level" is
        the paper's heuristic; FORWARD only in late blocks, as it biases the gradient for the client; scores have
        mean 1; a stream decides ties.
    """

    budget: float = knob(0.6, "share of the cost of all units in full; 1.0 is off", above=0.0, high=1.0)
    by: str = knob(
        "compute",
        "what the budget counts: FLOPs, or traffic between workers (FULL 2, FORWARD 1 per sample)",
        choices=("compute", "communication"),
    )
    workers: int = knob(0, "server workers among which the units are dealt; 0 is one per unit", low=0)
    capacities: str = knob("", "budgets of the workers, comma-separated, dealt in turn; empty is `budget` for all")
    choice: str = knob(
        "joint", "FULL and FORWARD 'joint', or FULL first and FORWARD with what is left", choices=("joint", "bi-level")
    )
    reserve: float = knob(0.0, "share of a capacity kept for FORWARD (choice 'bi-level'); below 1", low=0.0, high=1.0)
    backward: str = knob("fisher", "score of running in full", choices=METRICS)
    forward: str = knob("fisher", "score of running at least forward", choices=METRICS)
    forward_weight: float = knob(1.0, "weight of the forward score (choice 'joint')", low=0.0)
    placement: str = knob(
        "late",
        "where FORWARD may be: in the last half of the planned blocks, anywhere, nowhere",
        choices=("late", "anywhere", "nowhere"),
    )
    calibrate: int = knob(2, "micro-batches that run in full, to be scored, when scores are due", low=0)
    refresh: int = knob(0, "rounds between scorings; 0 scores once", low=0)
    units: str = knob("head", "what is planned: single units or whole blocks", choices=("head", "block"))

    def __post_init__(self) -> None:
        if self.reserve >= 1:
            raise FedsplitError(f"reserve must be below 1, so that some units run in full, got {self.reserve:g}.")
        for text in split_names(self.capacities):
            try:
                fits = 0 < Fraction(text) <= 1
            except (ValueError, ZeroDivisionError):
                fits = False
            if not fits:
                raise FedsplitError(f"capacities must be numbers above 0 and at most 1, e.g. '0.4,0.8', got '{text}'.")

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of `ask.scores` that `plan` reads."""
        return tuple(dict.fromkeys(name for name in (self.backward, self.forward) if name in SCORES))

    @property
    def needs_gradients(self) -> bool:
        """Whether a metric needs gradients, and so micro-batches that run in full."""
        return any(name != "magnitude" for name in self.metrics)

    def probes(self, ask: Ask) -> int:
        """How many first micro-batches can be all FULL within every worker's capacity, at most `calibrate`.

        None where all units run in full anyway: there is nothing to choose by scores.
        """
        costs = self._costs(ask)
        return 0 if min(costs.shares) == 1 else min(self.calibrate, costs.rows_in_full)

    def check(self, ask: Ask) -> None:
        """Whether `plan` can do something sensible with such an `ask`.

        Raises:
            FedsplitError: blocks that cannot be sliced; more workers than units; no unit of any micro-batch fits
                in full; OR-Tools is missing.
        """
        if self.units == "head" and ask.units == 1:
            raise FedsplitError(
                "the blocks to plan cannot all be sliced into the same number of heads; set body.knapsack.units=block, "
                "or body.scope=body where only those of a pruned front differ."
            )
        costs = self._costs(ask)
        if not costs.items or not ask.micro_batches:
            return
        least = int(ask.sizes.min())
        if max(costs.shares) < 1 and not any(
            (self._for_full(costs, w) >= costs.full[units] * least).any() for w, units in costs.dealt
        ):
            need = min(
                Fraction(int(costs.full[units].min()) * least, costs.whole_of(units)) for _, units in costs.dealt
            )
            need = min(Fraction(1), need / (1 - Fraction(repr(self.reserve))))
            at_most = max(costs.shares)
            places = 1 + math.ceil(-math.log10(need))
            raise FedsplitError(
                f"a budget of {float(at_most):g} buys no unit of any of {ask.micro_batches} mini-batches; raise it to "
                f"at least {math.ceil(need * 10**places) / 10**places:g}, or lower local.batch-size."
            )
        if find_spec("ortools") is None and not self._counted(costs):
            raise self._missing()

    def plan(self, ask: Ask, key: int) -> Tensor:
        """The table (M, L, U) int8 of `Op` values; stream `key` decides ties and random scores.

        The first `ask.probes` micro-batches are all FULL, as far as every capacity allows. Scores of 0 and more;
        one that is not finite counts as the mean of its unit's, else of all that are.

        Raises:
            FedsplitError: more workers than units, or OR-Tools is needed and missing.
        """
        costs = self._costs(ask)
        table = torch.full((ask.micro_batches, ask.depth, ask.units), int(Op.FULL), dtype=torch.int8)
        first = min(ask.probes, costs.rows_in_full)
        sizes = costs.sizes[first:]
        if not costs.items or not len(sizes):
            return table
        backward = self._score(ask, self.backward, first, rng.key(key, "backward"))
        forward = self._score(ask, self.forward, first, rng.key(key, "forward"))
        ops = np.full((len(sizes), costs.items), int(Op.FULL), dtype=np.int8)
        for number, group in enumerate(costs.groups()):
            units = np.stack([costs.dealt[w][1] for w in group])
            spent = np.array([costs.whole_of(own, first) for own in units])
            left = np.maximum(np.array([costs.capacity(w, first) for w in group]) - spent, 0)
            for_full = np.maximum(np.array([self._for_full(costs, w, first) for w in group]) - spent, 0)
            late = np.broadcast_to(self._may_forward(costs)[units][:, None], (len(group), len(sizes), units.shape[1]))
            b, a = (scores[:, units].swapaxes(0, 1).reshape(len(group), -1) for scores in (backward, forward))
            weights = [np.outer(sizes, cost[units[0]]).reshape(-1) for cost in (costs.full, costs.forward)]
            stream = rng.key(key, "group", number)
            found = self._choose(b, a, late.reshape(len(group), -1), (weights[0], weights[1]), left, for_full, stream)
            ops[:, units] = found.reshape(len(group), len(sizes), -1).swapaxes(0, 1)
        planned = torch.from_numpy(ops.reshape(len(sizes), len(ask.blocks), -1))
        table[first:, list(ask.blocks)] = planned.expand(-1, -1, ask.units)
        return table

    def loads(self, ask: Ask, ops: Tensor) -> Tensor:
        """What each worker's units cost under `ops` (M, L, U), over what they cost in full: (W,) float64."""
        costs = self._costs(ask)
        spent = costs.of(ops[:, list(ask.blocks)].long().cpu())
        loads = [spent[:, units].sum() / costs.whole_of(units) for _, units in costs.dealt]
        return torch.tensor(loads, dtype=torch.float64)

    def _costs(self, ask: Ask) -> Costs:
        shares = [Fraction(text) for text in split_names(self.capacities)] or [Fraction(repr(self.budget))]
        return Costs(ask, by=self.by, units=self.units, workers=self.workers, shares=shares)

    def _choose(
        self, b: Floats, a: Floats, late: Bools, weights: tuple[Ints, Ints], left: Ints, for_full: Ints, key: int
    ) -> Ops:
        """The ops (G, n) of G workers with scores `b` and `a` (G, n), of which `late` may run forward only."""
        try:
            if self.choice == "joint":
                full, forward = solve.integers(b, self.forward_weight * a)
                forward[~late] = NEVER
                return solve.joint(full, forward, *weights, left, key)
            gains = solve.integers(b, np.zeros_like(b))[0]
            chosen = solve.knapsack(gains, weights[0], for_full, rng.key(key, "full"))
            gains = solve.integers(a, np.zeros_like(a))[0]
            gains[chosen | ~late] = NEVER
            rest = left - (chosen * weights[0]).sum(axis=1)
            too = solve.knapsack(gains, weights[1], rest, rng.key(key, "forward"))
            return np.where(chosen, Op.FULL, np.where(too, Op.FORWARD, Op.SKIP)).astype(np.int8)
        except ImportError:
            raise self._missing() from None

    def _missing(self) -> FedsplitError:
        return FedsplitError(f"body.knapsack.choice={self.choice} needs OR-Tools: pip install 'fedsplit[knapsack]'.")

    def _counted(self, costs: Costs) -> bool:
        """Whether the knapsacks of all micro-batches can be solved without OR-Tools."""
        joint = self.choice == "joint"
        for group in costs.groups():
            units = costs.dealt[group[0]][1]
            weights = [np.outer(costs.sizes, cost[units]).reshape(-1) for cost in (costs.full, costs.forward)]
            gains = np.ones((len(group), len(weights[0]), 2))
            gains[:, :, 1] = 1.0 if joint and self._may_forward(costs).any() else NEVER
            for pair in [weights] if joint else [[weight, weight] for weight in weights]:
                if not countable(gains, np.stack(pair, axis=1)):
                    return False
        return True

    def _for_full(self, costs: Costs, worker: int, first: int = 0) -> int:
        """The part of a worker's capacity that FULL may take."""
        capacity = costs.capacity(worker, first)
        return capacity if self.choice == "joint" else math.floor((1 - Fraction(repr(self.reserve))) * capacity)

    def _may_forward(self, costs: Costs) -> Bools:
        """Which items (N,) may run forward only."""
        if self.placement == "nowhere" or (self.choice == "joint" and self.forward_weight == 0):
            return np.zeros(costs.items, dtype=bool)
        first = 0 if self.placement == "anywhere" else costs.blocks - costs.blocks // 2
        return np.arange(costs.items) // costs.per_block >= first

    def _score(self, ask: Ask, name: str, first: int, key: int) -> Floats:
        """What the items gain in the micro-batches from `first` on, (M - first, N), with mean 1."""
        shape = (ask.micro_batches, len(ask.blocks), ask.units)
        if name == "random":
            known = torch.rand(shape, generator=rng.torch_rng(key), dtype=torch.float64)
        elif name == "depth":
            known = torch.arange(len(ask.blocks), 0, -1, dtype=torch.float64)[:, None].expand(shape)
        elif name in ask.scores:
            known = ask.scores[name][:, list(ask.blocks)].double().cpu()
        else:
            known = torch.full(shape, torch.nan, dtype=torch.float64)
        known = known.clamp(min=0).masked_fill(~known.isfinite(), torch.nan)
        known = torch.where(known.isnan(), known.nanmean(dim=0), known)
        known = torch.where(known.isnan(), known.nanmean(), known).nan_to_num(0.0)[first:]
        if self.units == "block":
            known = known.sum(dim=2, keepdim=True)
        mean = known.mean()
        scores = known / mean if mean > 0 else torch.ones_like(known)  # nothing known: all are worth the same
        flat: Floats = scores.flatten(1).numpy()
        return flat
