"""The figures of a backbone: top-1 of its own classifier, and a linear probe on frozen features.

python -m fedsplit.pretrain.probe --weights fedsplit_micro --data digits
python -m fedsplit.pretrain.probe --weights fedsplit_micro --data FOLDER --own-head
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsplit import assets
from fedsplit.data import sources
from fedsplit.data.batches import to_batch
from fedsplit.data.raw import missing_package
from fedsplit.front.models import SHIPPED, SHIPPED_MEAN, SHIPPED_STD, Backbone, load_weights, read_weights
from fedsplit.pretrain.recipe import SHAPES, Pretrain, network
from fedsplit.settings import Data
from fedsplit.types import DataSet, FedsplitError, Images

BATCH = 256


def features(backbone: Backbone, images: Images) -> Tensor:
    """Pooled features (S, C) float32 of all images in evaluation mode, on the CPU."""
    vit, parts = cast(Any, backbone.vit), []
    before, device = vit.training, next(vit.parameters()).device
    vit.eval()
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            rows = np.arange(start, min(start + BATCH, len(images)))
            x = to_batch(images, rows, backbone.mean, backbone.std, "none", 0, device).x
            parts.append(vit.forward_head(vit.forward_features(x), pre_logits=True).float().cpu())
    vit.train(before)
    return torch.cat(parts)


def top1(backbone: Backbone, images: Images) -> float:
    """The fraction of `images` that the backbone's own classifier gets right, 0 to 1."""
    vit = cast(Any, backbone.vit)
    found = features(backbone, images).to(next(vit.parameters()).device)
    with torch.inference_mode():
        guess: npt.NDArray[np.int64] = vit.head(found).argmax(1).cpu().numpy()
    return float((guess == images.labels).mean())


def linear(backbone: Backbone, data: DataSet) -> float:
    """Test accuracy, 0 to 1, of logistic regression on standardised pooled features (L2 with C = 1).

    Raises:
        FedsplitError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ModuleNotFoundError as error:
        raise missing_package(error, "the linear probe") from error
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=1000))
    fitted.fit(features(backbone, data.train).numpy(), data.train.labels)
    return float(fitted.score(features(backbone, data.test).numpy(), data.test.labels))


def open_backbone(weights: str, model: str = "") -> Backbone:
    """A shipped name or a weights file as a backbone with its own classifier.

    `model` is the name of its shape; empty finds the one that fits.

    Raises:
        FedsplitError: the weights are missing or of another shape.
    """
    path = assets.locate(f"{weights}.safetensors") if weights in SHIPPED else Path(weights)
    state = read_weights(path)
    if "pos_embed" not in state or "head.weight" not in state:
        raise FedsplitError(f"{path} holds no backbone with a classifier; give one that fedsplit pretrain wrote.")
    _, tokens, width = state["pos_embed"].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    fits = [name for name, shape in SHAPES.items() if (shape["embed_dim"], shape["depth"]) == (width, depth)]
    if not (name := model or next(iter(fits), "")) or name not in SHAPES:
        raise FedsplitError(f"{path} is {width} wide and {depth} deep, none of: {', '.join(SHAPES)}.")
    size = math.isqrt(tokens) * int(SHAPES[name]["patch_size"])
    vit = network(Pretrain(model=name, image_size=size), len(state["head.weight"]))
    load_weights(vit, path)
    return Backbone(vit, size, SHIPPED_MEAN, SHIPPED_STD)


def probe(weights: str, data: str, *, limit: int = 0, test_limit: int = 0, own_head: bool = False) -> dict[str, Any]:
    """The figures of `weights` on `data`, beside those of the same network with random weights.

    Raises:
        FedsplitError: weights or data that cannot be used, or, with `own_head`, another number of classes.
    """
    backbone = open_backbone(weights)
    source = Data(source=data, limit=1 if own_head else limit, test_limit=test_limit)
    images = sources.load(source, backbone.image_size)
    facts = {"weights": Path(weights).stem, "data": images.name, "test": len(images.test)}
    if own_head:
        classes = cast(Any, backbone.vit).num_classes
        if classes != len(images.classes):
            raise FedsplitError(
                f"{weights} knows {classes} classes and {data} has {len(images.classes)}; leave out --own-head."
            )
        return facts | {"top1": round(top1(backbone, images.test), 4), "chance": round(1 / classes, 4)}
    scores = {"linear": linear(backbone, images), "random_weights": linear(_random(backbone), images)}
    return facts | {"train": len(images.train)} | {name: round(value, 4) for name, value in scores.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures as one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m fedsplit.pretrain.probe", description="The figures of a backbone.")
    parser.add_argument("--weights", required=True, help="a shipped name, or a file that fedsplit pretrain wrote")
    parser.add_argument("--data", default="digits", help="'digits' or a folder with train.parquet and test.parquet")
    parser.add_argument("--limit", type=int, default=0, help="only the first so many training images")
    parser.add_argument("--test-limit", type=int, default=0, help="only the first so many test images")
    parser.add_argument("--own-head", action="store_true", help="top-1 of the weights' own classifier")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options = vars(parser.parse_args(arguments))
    torch.set_num_threads(options.pop("threads"))
    try:
        print(json.dumps(probe(**options)))
        return 0
    except FedsplitError as error:
        print(f"fedsplit: {error}", file=sys.stderr)
        return 2


def _random(backbone: Backbone) -> Backbone:
    """The same network before training."""
    vit = cast(Any, backbone.vit)
    shape = next(n for n, s in SHAPES.items() if (s["embed_dim"], s["depth"]) == (vit.embed_dim, len(vit.blocks)))
    fresh = network(Pretrain(model=shape, image_size=backbone.image_size), vit.num_classes, "random")
    return Backbone(fresh, backbone.image_size, backbone.mean, backbone.std)


if __name__ == "__main__":
    sys.exit(main())
