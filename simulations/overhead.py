"""What the framework costs: the same training in a bare PyTorch loop, in process, and by `flwr run`.

    python simulations/overhead.py [--quick]

The bare loop is plain timm and torch: per round and client it loads the global weights, trains on
the same batches in one graph without a cut, and averages; then it tests the model. It makes timm's
tokens contiguous once, as fedsplit does, since they are strided without a class token. All three use
one process of one thread for the clients and must end in the same weights:
`largest_weight_difference` is 0 on one machine. Ratios compare the median wall time of a round, the
first round left out (it warms up caches, and under Flower it starts Ray); start-up is reported beside
them. Prints one line of JSON last.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from fedsplit import experiment
from fedsplit.config import Config, load
from fedsplit.data.batches import batches
from fedsplit.runs import RunFolder
from fedsplit.runtime.inprocess import runner
from fedsplit.runtime.superlink import flwr_run
from fedsplit.types import Tensors
from fedsplit.world import World, world

APP = Path(__file__).resolve().parent.parent


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples and rounds")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key")
    options = parser.parse_args()
    size = ["rounds=4", "data.limit=400", "data.test-limit=100"] if options.quick else ["rounds=6"]
    with tempfile.TemporaryDirectory() as folder:
        config = load([APP / "configs/demo.toml"], ["local.epochs=1", *size, *options.set])
        bare, weights = bare_loop(config)
        print(f"bare loop        {bare:6.2f} s a round", flush=True)
        inside, same = in_process(config.replace(out=f"{folder}/inside"), weights)
        print(f"in process       {inside:6.2f} s a round", flush=True)
        flower, startup = by_flower(config.replace(out=f"{folder}/flower"))
        print(f"flwr run         {flower:6.2f} s a round, {startup:.1f} s to start up and end", flush=True)
    figures: Mapping[str, float] = {
        "in_process_ratio": round(inside / bare, 3),
        "flwr_ratio": round(flower / bare, 3),
        "bare_round_s": round(bare, 3),
        "flwr_startup_s": round(startup, 1),
        "largest_weight_difference": same,
    }
    print(json.dumps(figures))


def bare_loop(config: Config) -> tuple[float, Tensors]:
    """Seconds a round and final weights of the loop that anybody would write with torch and timm."""
    built = world(config)
    vit = copy.deepcopy(built.backbone.vit).train()
    vit.norm_pre.register_forward_hook(lambda _module, _inputs, tokens: tokens.contiguous())
    names = [name for name, p in vit.named_parameters() if p.requires_grad]
    model = {name: value.clone() for name, value in vit.state_dict().items()}
    times = []
    for number in range(1, config.rounds + 1):
        begun = time.perf_counter()
        updates = []
        for client, shard in enumerate(built.shards):
            vit.load_state_dict(model)
            optimizer = torch.optim.AdamW(vit.parameters(), lr=config.optimizer.lr, weight_decay=0.0)
            for indices in _order(built, number, client, config.local.batch_size):
                x, y = _images(built.data.train.pixels[indices]), torch.from_numpy(built.data.train.labels[indices])
                optimizer.zero_grad()
                F.cross_entropy(vit(x), y).backward()
                optimizer.step()
            updates.append((len(shard), {name: value.clone() for name, value in vit.state_dict().items()}))
        total = sum(count for count, _ in updates)
        for name in names:
            mean = torch.zeros(model[name].shape, dtype=torch.float64)
            for count, state in updates:
                mean.add_(state[name].double(), alpha=count / total)
            model[name] = mean.float()
        vit.load_state_dict(model)
        _test(built, vit)
        times.append(time.perf_counter() - begun)
        print(f"  bare round {number} of {config.rounds}", flush=True)
    return statistics.median(times[1:]), model


def in_process(config: Config, weights: Tensors) -> tuple[float, float]:
    """Seconds a round by `fedsplit run`, and how far its weights are from those of the bare loop."""
    path = experiment.run(config, runner(config))
    final = world(config).model_state()
    return _median(path), max(float((final[name] - weights[name]).abs().max()) for name in weights)


def by_flower(config: Config) -> tuple[float, float]:
    """Seconds a round by `flwr run` with one client process, and all its other seconds."""
    done = flwr_run(APP, config.values, nodes=config.devices.count, ray_cpus=1)
    each = _median(Path(config.out))
    return each, done.wall_s - each * config.rounds


def _order(built: World, number: int, client: int, size: int) -> list[np.ndarray]:
    return list(batches(built.shards[client], size, built.key("batches", number, client, 0)))


def _images(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float().div(255).sub(0.5).div(0.5)


@torch.inference_mode()
def _test(built: World, vit: torch.nn.Module) -> float:
    vit.eval()
    right = 0
    for start in range(0, len(built.data.test), built.config.eval.batch_size):
        chunk = slice(start, start + built.config.eval.batch_size)
        logits = vit(_images(built.data.test.pixels[chunk].copy()))
        right += int((logits.argmax(1) == torch.from_numpy(built.data.test.labels[chunk])).sum())
    vit.train()
    return right / len(built.data.test)


def _median(path: Path) -> float:
    return statistics.median(float(row["wall_s"]) for row in RunFolder(path).rows("rounds")[1:])


if __name__ == "__main__":
    main()
