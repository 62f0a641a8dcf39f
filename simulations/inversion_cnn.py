"""The white-box attack of He, Zhang and Lee on their small CNN: do we land where they did?

    python simulations/inversion_cnn.py --data FOLDER [--quick] [--images N] [--layers conv11,ReLU22,ReLU32]
        [--steps N] [--tv WEIGHT] [--lr RATE] [--skip N] [--net FILE] [--seed N] [--threads N] [--json]

Published: ACSAC 2019, CIFAR-10, PSNR and SSIM of reconstructions from conv11, ReLU22 and ReLU32. The network is
theirs by their public code (3x3 convolutions of 64, 64, pool, 128, 128, pool, 128, 128, pool, then 512 sigmoid
units and 10 classes; inputs normalised with ImageNet's statistics), and so are the attack's steps, learning rate,
AMSGrad and form of the prior. Ours: three epochs of training on a fifth of CIFAR-10, with flips, instead of 200
epochs on all of it; Adam's epsilon; the images (of the test set the first of each class, then the second of each,
and so on); pixels in [0, 1] that are clamped at each step; a feature distance on standardised activations, so that
the weights of total variation are on another scale. Ours were chosen with `--skip 10`: on images that are not
those reported.

The attacks are the registry's own pieces. What crosses the cut is a layer's output as tokens (B, H * W, C).
`mean` is the mean of the training images: what comes out no better tells nothing. PSNR is the mean over images,
SSIM that of torchmetrics on RGB (Gaussian window of 11 x 11). Prints one line of JSON last, with `rows`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fedsplit import rng
from fedsplit.attacks import ATTACKS
from fedsplit.attacks.base import Knowledge, Transcript
from fedsplit.attacks.work import Work
from fedsplit.data.sources import load
from fedsplit.settings import Data
from fedsplit.types import DataSet, Images

SHAPE = (3, 32, 32)
# attack -> layer -> PSNR in dB, SSIM; the inverse net's are those of queries with the same distribution.
PUBLISHED = {
    "rmle": {"conv11": (37.59, 0.9960), "ReLU22": (19.47, 0.6940), "ReLU32": (13.38, 0.1625)},
    "inverse-net": {"conv11": (49.02, 0.9992), "ReLU22": (19.36, 0.6802), "ReLU32": (13.95, 0.2196)},
}
LAYERS = tuple(PUBLISHED["rmle"])
TV = {"conv11": 0.0, "ReLU22": 3.0, "ReLU32": 10.0}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalise(nn.Module):
    """Images in [0, 1] as the network reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("deviation", torch.tensor(DEVIATION)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32) to (B, 3, 32, 32)."""
        return (x - self.mean) / self.deviation


def network(seed: int) -> nn.Sequential:
    """The CNN of He, Zhang and Lee with new weights; its layers go by their names."""
    widths = {"11": (3, 64), "12": (64, 64), "21": (64, 128), "22": (128, 128), "31": (128, 128), "32": (128, 128)}
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = nn.Sequential()
        net.add_module("normalise", Normalise())
        for name, (enter, leave) in widths.items():
            net.add_module(f"conv{name}", nn.Conv2d(enter, leave, 3, padding=1))
            net.add_module(f"ReLU{name}", nn.ReLU())
            if name.endswith("2"):
                net.add_module(f"pool{name[0]}", nn.MaxPool2d(2))
        for name, layer in (("flat", nn.Flatten()), ("fc1", nn.Linear(2048, 512)), ("fc1act", nn.Sigmoid())):
            net.add_module(name, layer)
        net.add_module("fc2", nn.Linear(512, 10))
    return net


def front_to(net: nn.Sequential, layer: str) -> Callable[[Tensor], Tensor]:
    """The network up to and with `layer`: images (B, 3, 32, 32) to its output as tokens (B, H * W, C)."""
    names = [name for name, _ in net.named_children()]
    front = net[: names.index(layer) + 1]
    return lambda x: front(x).flatten(2).transpose(1, 2).contiguous()


def main() -> None:
    """Train, attack and print."""
    options = arguments()
    torch.set_num_threads(options.threads)
    with redirect_stdout(sys.stderr if options.json else sys.stdout):
        found = study(options)
    print(json.dumps(found))


def study(options: Any) -> dict[str, Any]:
    """What the line of JSON says."""
    data = load(Data(source=options.data, limit=options.limit + options.auxiliary), 32)
    train, other = part(data.train, 0, options.limit), part(data.train, options.limit, options.auxiliary)
    net, accuracy = trained(options, train, data)
    victims = pixels(data.test, one_of_each(data.test.labels)[options.skip :][: options.images])
    rows = [row("mean", "", pixels(train).mean(0, keepdim=True).expand_as(victims), victims)]
    for layer in options.layers:
        front = front_to(net, layer)
        with torch.no_grad():
            transcript = Transcript(front(victims)[None], SHAPE)
        knowledge = Knowledge(front=front, query=lambda x, _, front=front: front(x), auxiliary=pixels(other))
        for name, piece in attacks(options, layer).items():
            begun = time.process_time()
            work = Work(heard=lambda what, done, total, layer=layer: told(f"{layer}: {what}", done, total))
            images = piece.run(transcript, knowledge, rng.key(options.seed, "attack", layer), work)
            rows.append(row(name, layer, images, victims) | {"cpu_s": round(time.process_time() - begun, 1)})
            print(f"  {rows[-1]}", flush=True)
    show(rows, accuracy, len(victims))
    return {"accuracy": accuracy, "images": len(victims), "rows": rows}


def arguments() -> Any:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train.parquet and test.parquet of CIFAR-10")
    parser.add_argument("--quick", action="store_true", help="less training, 4 images, 400 steps")
    parser.add_argument("--images", type=int, help="test images under attack (8)")
    parser.add_argument("--steps", type=int, help="steps of the optimisation (5000, as published)")
    parser.add_argument("--layers", default=",".join(LAYERS), help="comma-separated")
    parser.add_argument("--tv", type=float, help="weight of total variation at every layer, instead of ours")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate of the optimisation")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many test images")
    parser.add_argument("--limit", type=int, help="training images of the network (10000)")
    parser.add_argument("--epochs", type=int, help="epochs of its training (3)")
    parser.add_argument("--auxiliary", type=int, help="images of an attacker who trains an inverse net (10000)")
    parser.add_argument("--attacks", default="rmle,inverse-net", help="comma-separated")
    parser.add_argument("--net", type=Path, help="file that keeps the trained network, or has it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="progress to stderr: stdout is the line of JSON alone")
    options = parser.parse_args()
    usual = {
        "images": (8, 4),
        "steps": (5000, 400),
        "limit": (10000, 3000),
        "epochs": (3, 1),
        "auxiliary": (10000, 500),
    }
    for name, (full, quick) in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    options.layers = tuple(name for name in options.layers.split(",") if name)
    return options


def trained(options: Any, train: Images, data: DataSet) -> tuple[nn.Sequential, float]:
    """The network, trained here or read from `options.net`, and its accuracy on 1000 test images."""
    net = network(rng.key(options.seed, "weights"))
    if options.net and options.net.is_file():
        net.load_state_dict(torch.load(options.net, weights_only=True))
    else:
        fit(net, train, options.epochs, options.seed)
        if options.net:
            torch.save(net.state_dict(), options.net)
    net.eval().requires_grad_(False)
    last = np.arange(len(data.test))[-1000:]
    with torch.no_grad():
        right = (net(pixels(data.test, last)).argmax(1) == torch.from_numpy(data.test.labels[last])).float().mean()
    print(f"  the network is right on {100 * right:.1f} % of {len(last)} test images", flush=True)
    return net, float(right)


def fit(net: nn.Sequential, train: Images, epochs: int, seed: int) -> None:
    """Train in place with batches and learning rate of the public code, and flips as only augmentation."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, amsgrad=True)
    steps = len(train) // 32
    for epoch in range(epochs):
        draw = rng.torch_rng(rng.key(seed, "epoch", epoch))
        for step, rows in enumerate(torch.randperm(len(train), generator=draw).split(32)[:steps]):
            x = pixels(train, rows.numpy())
            flip = torch.rand(len(x), generator=draw) < 0.5
            x[flip] = x[flip].flip(3)
            loss = nn.functional.cross_entropy(net(x), torch.from_numpy(train.labels[rows.numpy()]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            told(f"training, loss {loss.item():.3f}", epoch * steps + step + 1, epochs * steps)


def attacks(options: Any, layer: str) -> dict[str, Any]:
    """The pieces to run at a layer, by their names."""
    found = {}
    for name in options.attacks.split(","):
        if name not in ATTACKS:
            print(f"  {name}: no such attack is registered, so its row is left out", flush=True)
        elif name == "rmle":
            tv = TV.get(layer, 0.0) if options.tv is None else options.tv
            found[name] = ATTACKS[name](steps=options.steps, lr=options.lr, tv=tv)
        else:
            less = {"steps": options.steps, "epochs": 2} if options.quick else {}
            known = {field.name for field in dataclasses.fields(ATTACKS[name])}
            found[name] = ATTACKS[name](**{knob: value for knob, value in less.items() if knob in known})
    return found


def part(images: Images, first: int, count: int) -> Images:
    """`count` images from `first` on."""
    return Images(images.pixels[first : first + count], images.labels[first : first + count])


def one_of_each(labels: Any) -> Any:
    """All rows, the first of each class before the second of each, and so on."""
    place = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        place[labels == label] = np.arange((labels == label).sum())
    return np.lexsort((labels, place))


def pixels(images: Images, rows: Any = None) -> Tensor:
    """Images (B, 3, 32, 32) float32 in [0, 1]; all, or those of `rows`."""
    chosen = images.pixels if rows is None else images.pixels[rows]
    return torch.from_numpy(np.array(chosen)).permute(0, 3, 1, 2).float() / 255


def row(attack: str, layer: str, found: Tensor, victims: Tensor) -> dict[str, Any]:
    """What is reported of one attack at one layer."""
    from torchmetrics.functional.image import structural_similarity_index_measure as similarity

    psnr = (-10 * (found - victims).square().mean((1, 2, 3)).clamp(min=1e-12).log10()).mean()
    published = PUBLISHED.get(attack, {}).get(layer, (None, None))
    return {
        "attack": attack,
        "layer": layer,
        "psnr": round(float(psnr), 2),
        "ssim": round(float(similarity(found, victims, data_range=1.0)), 4),
        "published_psnr": published[0],
        "published_ssim": published[1],
    }


def told(what: str, done: int, total: int) -> None:
    """A line of progress at each twentieth."""
    if done == total or done * 20 // total > (done - 1) * 20 // total:
        print(f"  {what}: {done} of {total}", flush=True)


def show(rows: list[dict[str, Any]], accuracy: float, images: int) -> None:
    """The table."""
    table = Table(title=f"{images} images of CIFAR-10, a network of {100 * accuracy:.1f} % accuracy")
    for title in ("attack", "layer", "PSNR (dB)", "published", "SSIM", "published"):
        table.add_column(title, justify="left" if title in ("attack", "layer") else "right")
    for found in rows:
        values = [(found["psnr"], found["published_psnr"], 2), (found["ssim"], found["published_ssim"], 4)]
        shown = [f"{value:.{digits}f}" if value is not None else "" for *pair, digits in values for value in pair]
        table.add_row(found["attack"], found["layer"], *shown)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
