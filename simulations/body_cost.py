"""What plans save: time, FLOPs and memory of a training step of the body, beside the same step in full.

    python simulations/body_cost.py [--quick] [--model NAME]... [--device cpu|cuda]

The body is every block of a model with random weights. A step is forward, backward and the optimiser's update, by
the plans of `knapsack` (random scores, heads) and of `layerdrop` (rate = 1 - budget, a fixed number of blocks,
uniform), with full fine-tuning and with LoRA of rank 8 on all four linear layers. Every planned step follows a full
one, so that a machine that slows down slows both. Seconds are this process's own on its one thread, so that other
work counts little; on a GPU they are wall time. `wall_ratio` is that of whole steps, `pass_ratio` without the
optimiser, whose work is no matter of the plan and not in the FLOPs. `flops_ratio` is counted for exactly the plans
that were timed; `memory_ratio` is the most bytes that autograd keeps in one of them, over those of the full step.
Prints one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fedsplit import rng
from fedsplit.body.ask import Ask
from fedsplit.body.knapsack import Knapsack
from fedsplit.body.layerdrop import LayerDrop
from fedsplit.body.lora import Lora
from fedsplit.front import models, trainable
from fedsplit.front.vit import Part, split
from fedsplit.metrics.flops import count, counting_copy
from fedsplit.metrics.memory import Meter
from fedsplit.metrics.plan_flops import PlanFlops
from fedsplit.optim import PartOptimizer
from fedsplit.settings import Model, Optimizer
from fedsplit.types import Cut, Op, Plan

BUDGETS = (0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
MODES = {"full": "all", "lora": "lora,head"}
# Samples a step, plans of each row, and how often each of them is timed.
SIZES = {"fedsplit_micro": (16, 5, 5), "vit_base_patch16_224": (4, 2, 1)}
QUICK = {"fedsplit_micro": (16, 2, 2)}
ELSE = (4, 2, 1)
MICRO_BATCHES = 10  # that the knapsacks share out; the first of them are timed
# The aims: time within a tenth of the FLOPs, and at half the blocks little more than half the memory.
WALL_AIM, MEMORY_AIM, HALF = 0.10, 0.55, 0.5

Seconds = tuple[float, float]


@dataclass(frozen=True)
class Bench:
    """A body in one mode, with what its steps need: tokens `x` (B, N, C) and the gradient `g` (B, N, C) at its end."""

    model: str
    mode: str
    body: Part
    ghost: Part
    optimizer: PartOptimizer
    costs: PlanFlops
    x: Tensor
    g: Tensor


@dataclass
class Timed:
    """Seconds of every planned step, by plan, and of the full ones before them.

    The first number is forward and backward, the second the whole step.
    """

    budget: float
    piece: str
    plans: Sequence[Plan | None]
    planned: dict[int, list[Seconds]] = field(default_factory=dict)
    full: list[Seconds] = field(default_factory=list)

    def ratio(self, which: int) -> float:
        """Medians of the planned steps, mean over the plans, to the median of the full ones."""
        medians = [statistics.median(times[which] for times in each) for each in self.planned.values()]
        return statistics.fmean(medians) / statistics.median(times[which] for times in self.full)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fedsplit_micro alone, few steps")
    parser.add_argument("--model", action="append", metavar="NAME", help="backbone (may be repeated)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs (cpu)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="samples a step")
    parser.add_argument("--plans", type=int, metavar="N", help="plans of each row")
    parser.add_argument("--repeats", type=int, metavar="N", help="times that each plan is timed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for model in options.model or (QUICK if options.quick else SIZES):
        batch, plans, repeats = (QUICK if options.quick else SIZES).get(model, ELSE)
        for mode in MODES:
            bench = build(model, mode, options.batch_size or batch, options.device)
            rows += measure(bench, options.plans or plans, options.repeats or repeats)
    show(rows)
    print(json.dumps({"rows": rows, **verdict(rows), "device": options.device}))


def build(model: str, mode: str, batch: int, device: str) -> Bench:
    """The body of `model`, all its blocks, with what trains in `mode`."""
    backbone = models.create(Model(name=model, pretrained=False), 10, 0)
    vit, cut = backbone.vit, Cut(0, 0, backbone.depth)
    if mode == "lora":
        Lora(rank=8).edit(vit, cut, 0)
    parts = split(vit.to(device), cut)
    parts.train()
    trains = trainable.resolve(MODES[mode], vit, parts)
    source = rng.torch_rng(rng.key(0, "body-cost"))
    image = torch.randn(batch, 3, backbone.image_size, backbone.image_size, generator=source).to(device)
    with torch.no_grad():
        x = parts.front(image).detach()
    x.requires_grad_(bool(trains.front))
    named = {name: p for name, p in parts.body.named().items() if p.requires_grad}
    return Bench(
        model=model,
        mode=mode,
        body=parts.body,
        ghost=split(counting_copy(vit), cut).body,
        optimizer=PartOptimizer(named, Optimizer(), 1e-5),
        costs=PlanFlops(vit, cut, backbone.image_size, "u-shape"),
        x=x,
        g=torch.randn(x.shape, generator=source).to(device) / x.numel(),
    )


def measure(bench: Bench, plans: int, repeats: int) -> list[dict[str, Any]]:
    """The rows of one body: both pieces at every budget."""
    rows = [Timed(budget, name, tables(bench, name, budget)[:plans]) for name in PIECES for budget in BUDGETS]
    step(bench, None)  # the first one makes the optimiser's moments
    for number in range(plans * repeats):
        begun = time.monotonic()
        for row in rows:
            which = number % plans
            row.full.append(step(bench, None))
            row.planned.setdefault(which, []).append(step(bench, row.plans[which]))
        spent = time.monotonic() - begun
        print(f"  {bench.model}, {bench.mode}: {number + 1} of {plans * repeats}, {spent:.1f} s", flush=True)
    whole = flops(bench, None), kept(bench, None)
    return [figures(bench, row, whole) for row in rows]


def figures(bench: Bench, row: Timed, whole: tuple[int, int]) -> dict[str, Any]:
    """A row of the table; `whole` are the FLOPs and the kept bytes of the full step."""
    flops_ratio = statistics.fmean(flops(bench, plan) for plan in row.plans) / whole[0]
    return {
        "budget": row.budget,
        "mode": bench.mode,
        "plan": row.piece,
        "model": bench.model,
        "flops_ratio": flops_ratio,
        "wall_ratio": row.ratio(1),
        "memory_ratio": max(kept(bench, plan) for plan in row.plans) / whole[1],
        "pass_ratio": row.ratio(0),
        "wall_over_flops": row.ratio(1) / flops_ratio,
        "pass_over_flops": row.ratio(0) / flops_ratio,
        "full_s": statistics.median(times[1] for times in row.full),
        "full_flops": whole[0],
        "full_kept_bytes": whole[1],
        "batch_size": len(bench.x),
        "plans": len(row.plans),
    }


def tables(bench: Bench, name: str, budget: float) -> list[Plan | None]:
    """What piece `name` has every micro-batch run; None is all in full."""
    forward, full, whole = bench.costs.table
    ask = Ask(
        sizes=torch.full((MICRO_BATCHES,), len(bench.x)),
        blocks=bench.body.numbers,
        depth=len(bench.body.numbers),
        units=bench.costs.units,
        forward_flops=forward,
        full_flops=full,
        whole_flops=whole,
    )
    ops = PIECES[name](budget).plan(ask, rng.key(0, "plan", name))
    return [None if bool((row == int(Op.FULL)).all()) else Plan(tuple(map(tuple, row.tolist()))) for row in ops]


PIECES: dict[str, Any] = {
    "knapsack": lambda budget: Knapsack(budget=budget, backward="random", forward="random"),
    "layerdrop": lambda budget: LayerDrop(rate=round(1 - budget, 9), shape="uniform", keep="none", recover=0.0),
}


def step(bench: Bench, plan: Plan | None) -> tuple[float, float]:
    """Take a training step; its seconds without the optimiser's update, and with it."""
    bench.optimizer.zero_grad()
    bench.x.grad = None
    begun = clock(bench.x)
    torch.autograd.backward([bench.body(bench.x, 0, plan)], [bench.g])
    passed = clock(bench.x)
    bench.optimizer.step(bench.body.idle(plan) if plan else {})
    return passed - begun, clock(bench.x) - begun


def clock(x: Tensor) -> float:
    """Seconds: of this process's own on a CPU, of wall time on a GPU, whose work is waited for."""
    if x.is_cuda:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def flops(bench: Bench, plan: Plan | None) -> int:
    """FLOPs of a step by `plan`, by torch's own counter on tensors without data."""
    x = torch.empty_like(bench.x, device="meta").requires_grad_(bench.x.requires_grad)
    out, forward = count(lambda: bench.ghost(x, 0, plan))
    back = count(lambda: torch.autograd.backward([out], [torch.empty_like(out)]))[1] if out.requires_grad else 0
    return forward + back


def kept(bench: Bench, plan: Plan | None) -> int:
    """Bytes that autograd keeps of a forward pass by `plan`, without weights; on a GPU what the allocator gave."""
    parameters: list[nn.Parameter] = list(bench.body.parameters())
    if bench.x.is_cuda:
        before = torch.cuda.memory_allocated()
        out = bench.body(bench.x, 0, plan)
        return int(torch.cuda.memory_allocated() - before - out.nbytes)
    meter = Meter()
    meter.ignore(parameters)
    with meter:
        bench.body(bench.x, 0, plan)
    return meter.saved_bytes


def verdict(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The worst of what has an aim: time over FLOPs less one, as is and without the optimiser; memory at half."""
    return {
        "worst_wall_over_flops": max(abs(row["wall_over_flops"] - 1) for row in rows),
        "worst_pass_over_flops": max(abs(row["pass_over_flops"] - 1) for row in rows),
        "wall_aim": WALL_AIM,
        "worst_memory_at_half": max(at_half(rows)),
        "memory_aim": MEMORY_AIM,
    }


def at_half(rows: Sequence[dict[str, Any]]) -> list[float]:
    """The memory ratios of layer dropout at rate 0.5."""
    return [row["memory_ratio"] for row in rows if row["plan"] == "layerdrop" and row["budget"] == HALF]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table, and the aims beside what was measured."""
    table = Table(title="a training step of the body by plans, over the same step in full")
    for name in ("model", "mode", "plan"):
        table.add_column(name)
    titles = (
        "budget",
        "FLOPs",
        "step time",
        "passes' time",
        "memory",
        "step / FLOPs",
        "passes / FLOPs",
        "full step (s)",
    )
    for title in titles:
        table.add_column(title, justify="right")
    names = ("flops_ratio", "wall_ratio", "pass_ratio", "memory_ratio", "wall_over_flops", "pass_over_flops")
    for row in rows:
        shown = [f"{row[name]:.3f}" for name in (*names, "full_s")]
        last = row["budget"] == BUDGETS[-1]
        table.add_row(row["model"], row["mode"], row["plan"], f"{row['budget']:g}", *shown, end_section=last)
    console = Console(width=150)
    console.print(table)
    found = verdict(rows)
    for text in (
        f"Time within {100 * WALL_AIM:.0f} % of the FLOPs: at worst {100 * found['worst_wall_over_flops']:.1f} % off, "
        f"forward and backward alone {100 * found['worst_pass_over_flops']:.1f} %.",
        f"Memory of layer dropout at rate 0.5 at most {MEMORY_AIM:g}: at worst {found['worst_memory_at_half']:.3f}.",
    ):
        console.print(text, highlight=False)


if __name__ == "__main__":
    main()
