"""What the plans of a client's round amounted to: FLOPs left out, units that ran, and their bias."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsplit.tail.losses import cross_entropy
from fedsplit.types import Batch, Op, Order, Plan, Report
from fedsplit.world import World


class Tally:
    """Counts step after step, before each of them runs."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.probes = 0
        self.cosine: float | None = None
        self._units: Counter[str] = Counter()
        self._spared = [0, 0]

    def add(self, order: Order, batch: Batch, noise: int) -> None:
        """A step over `batch` by `order` follows."""
        self.count(order, len(batch.y))
        if self.world.config.body.cosine and self.cosine is None and order.plan is not None and not order.probe:
            self.cosine = gradient_cosine(self.world, batch, noise, order.plan)

    def count(self, order: Order, samples: int, steps: int = 1) -> None:
        """`steps` steps over `samples` samples each, by `order`."""
        self.probes += steps * bool(order.probe)
        if not self.world.config.names("body.plans"):
            return
        for side, flops in enumerate(self.world.plan_flops.spared(order.plan)):
            self._spared[side] += flops * samples * steps
        self._units.update(dict.fromkeys(_ran(order.plan, self.world.cut.depth, self.world.plan_flops.units), steps))

    def figures(self, report: Report) -> dict[str, Any]:
        """The fields of `report`, which counts all steps in full, that plans change."""
        client, server = self._spared
        return {
            "client_flops": report.client_flops - client,
            "client_infer_flops": min(report.client_infer_flops, report.client_flops - client),
            "server_flops": report.server_flops - server,
            "probe_steps": self.probes,
            "units": dict(sorted(self._units.items())),
            "gradient_cosine": self.cosine,
        }


def gradient_cosine(world: World, batch: Batch, noise: int, plan: Plan) -> float:
    """The cosine between the gradient of the loss at the cut by `plan` and the exact one, on one batch.

    A diagnostic beside the step: nothing of it crosses the wire or enters the ledger, and it is not counted.
    """
    parts = world.parts
    with torch.no_grad():
        h = parts.front(batch.x, noise, plan, world.start)
    found: list[Tensor] = []
    for chosen in (plan, None):
        u = h.detach().requires_grad_()
        with torch.enable_grad():
            loss = cross_entropy(parts.tail(parts.body(u, noise, chosen), noise, chosen), batch.y)
            found.append(torch.autograd.grad(loss, u)[0].flatten())
    return float(F.cosine_similarity(found[0], found[1], dim=0))


def _ran(plan: Plan | None, depth: int, units: int) -> Iterator[str]:
    for block in range(depth):
        row = plan.ops[block] if plan else (int(Op.FULL),) * units
        for unit, op in enumerate(row):
            if op != Op.SKIP:
                yield f"{block}.{unit}.{Op(op).name.lower()}"
