"""The scene of an attack: what the server saw of some training samples, and what an attacker may know.

The transcript is recorded by running the very steps of training once more, through codecs and bytes, with
a learning rate of 0: weights stay those of the finished run. The originals stay on this side.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fedsplit.attacks.base import Knowledge, Transcript
from fedsplit.audit.hijack import Misled
from fedsplit.body.service import LocalBody
from fedsplit.config import Config
from fedsplit.data.batches import to_batch
from fedsplit.data.sources import load
from fedsplit.front.guard import quiet
from fedsplit.front.vit import Parts, split
from fedsplit.layout import pooling
from fedsplit.optim import PartOptimizer
from fedsplit.rng import numpy_rng, torch_rng
from fedsplit.step import Client, u_shape_step, vanilla_step
from fedsplit.types import Batch, FedsplitError, Images, Stream, Tensors
from fedsplit.wire.link import Link
from fedsplit.world import Indices, World

QUERIES = 256  # images a query passes at a time


@dataclass(frozen=True)
class Scene:
    """An attack's input, and the `originals` (S, 3, height, width) in [0, 1] with `labels` (S,) that it is scored by.

    `ids` are the samples' numbers in the training set, `sample_bytes` what one upload of one sample takes on
    the wire, by stream, and `shapes` what it consists of.
    """

    transcript: Transcript
    knowledge: Knowledge
    originals: Tensor
    labels: Tensor
    ids: Indices
    sample_bytes: dict[str, float]
    shapes: dict[str, list[int]]


def scene(built: World) -> Scene:
    """The scene of the model in `built`, as its section `audit` of the config sets it.

    Raises:
        FedsplitError: nothing crosses a wire, or an auxiliary set that cannot be had.
    """
    config = built.config
    if config.cut.shape == "none":
        raise FedsplitError(
            "cut.shape=none sends no activations: there is nothing to reconstruct images from; audit a split run."
        )
    ids = victims(built)
    recorder = _Recorder()
    for upload in range(config.audit.uploads):
        for number, batch in enumerate(_batches(built, ids)):
            _step(built, batch, built.key("audit", "upload", upload, number), recorder)
    transcript = recorder.transcript(built, len(ids), config.audit.uploads)
    return Scene(
        transcript=transcript,
        knowledge=knowledge(built),
        originals=pixels(built.data.train, ids),
        labels=torch.from_numpy(built.data.train.labels[ids]),
        ids=ids,
        sample_bytes={name: size / (len(ids) * config.audit.uploads) for name, size in recorder.sizes.items()},
        shapes=recorder.shapes,
    )


def victims(built: World) -> Indices:
    """Numbers (S,) of the attacked samples: `audit.victims` of all that devices train on, drawn by the run's seed."""
    held = np.sort(np.concatenate(built.shards))
    order = numpy_rng(built.key("audit", "victims")).permutation(len(held))
    return held[order[: built.config.audit.victims]]


def pixels(images: Images, rows: Indices) -> Tensor:
    """The images at `rows` (S,) as (S, 3, height, width) float32 in [0, 1]."""
    return torch.from_numpy(np.array(images.pixels[rows])).permute(0, 3, 1, 2).contiguous().float() / 255


def knowledge(built: World) -> Knowledge:
    """What section `audit` grants an attacker of the model in `built`, which it copies.

    Raises:
        FedsplitError: it grants something unknown, or an auxiliary set that is missing.
    """
    config = built.config
    granted = {word.strip() for word in config.audit.knows.split(",") if word.strip()}
    if odd := granted - {"front", "rest", "query", "hijack"}:
        raise FedsplitError(f"audit.knows names no '{sorted(odd)[0]}'; known: front, rest, query, hijack.")
    images, labels = auxiliary(config, built)
    server = _Copy(built)
    return Knowledge(
        front=server.front if "front" in granted else None,
        body=server.body if "rest" in granted else None,
        tail=server.tail if "rest" in granted else None,
        query=server.query if "query" in granted else None,
        auxiliary=images,
        labels=labels,
        hijack=Misled(built, victims(built)) if "hijack" in granted else None,
    )


def auxiliary(config: Config, built: World) -> tuple[Tensor | None, Tensor | None]:
    """The attacker's own images (A, 3, height, width) in [0, 1] and their labels (A,), by `audit.auxiliary`.

    Raises:
        FedsplitError: another data source is asked for and not named, or cannot be read.
    """
    kind, most = config.audit.auxiliary, config.audit.images
    if kind == "none":
        return None, None
    if kind == "other":
        if not config.audit.other:
            raise FedsplitError("audit.auxiliary=other needs a data source; set audit.other, e.g. to a folder.")
        source = replace(config.data, source=config.audit.other, classes=0, limit=0, test_limit=1)
        images = load(source, built.backbone.image_size).train
    else:
        images = built.data.train if kind == "same" else built.data.test
    rows = np.sort(np.concatenate(built.shards)) if kind == "same" else np.arange(len(images))
    order = numpy_rng(built.key("audit", "auxiliary")).permutation(len(rows))
    chosen = rows[order]
    if kind == "same":  # an upper bound: the victims are among them
        attacked = victims(built)
        chosen = np.concatenate([attacked, chosen[~np.isin(chosen, attacked)]])
    chosen = chosen[:most]
    labels = None if kind == "other" else torch.from_numpy(images.labels[chosen])
    return pixels(images, chosen), labels


class _Copy:
    """A copy of the model as an attacker has it; `front`, `body` and `tail` draw nothing at random."""

    def __init__(self, built: World) -> None:
        self.built = built
        vit = copy.deepcopy(built.backbone.vit).requires_grad_(False)
        self.parts: Parts = split(vit, built.cut, pooling(built.config, vit, built.cut))
        self.parts.train(False)
        mean, std = (
            torch.tensor(v, device=built.device).view(1, 3, 1, 1) for v in (built.look["mean"], built.look["std"])
        )
        self.mean, self.std = mean, std

    def front(self, images: Tensor) -> Tensor:
        """Activations (B, N, C) that images (B, 3, height, width) give before compression, without noise."""
        with quiet(self.parts.front):
            activations: Tensor = self.parts.front((images.to(self.mean.device) - self.mean) / self.std)
        return activations

    def body(self, activations: Tensor) -> Tensor:
        """What the body sends down for activations (B, N, C)."""
        tokens: Tensor = self.parts.body(activations)
        return tokens

    def tail(self, tokens: Tensor) -> Tensor:
        """Logits (B, classes) of what the body sends down."""
        logits: Tensor = self.parts.tail(tokens)
        return logits

    def query(self, images: Tensor, key: int) -> Tensor:
        """What the server would see of images (B, 3, height, width), by draw `key`, (B, N, C)."""
        self.parts.train(True)
        client, server = (Link(self.built.codecs) for _ in range(2))
        found = []
        with torch.no_grad():
            for start in range(0, len(images), QUERIES):
                x = (images[start : start + QUERIES].to(self.mean.device) - self.mean) / self.std
                noise = int(torch.randint(2**62, (), generator=torch_rng(key + start)))
                h = self.parts.front(x, noise)
                found.append(server.decode("activations-up", client.encode("activations-up", {"x": h}))["x"].float())
        self.parts.train(False)
        return torch.cat(found)


@dataclass
class _Recorder:
    """What the server's end of the link received, in order, and its bytes."""

    seen: dict[str, list[Tensor]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)

    def __call__(self, stream: Stream, tensors: Tensors) -> None:
        for name in ("x", "labels"):
            if name in tensors:
                self.seen.setdefault(f"{stream}.{name}", []).append(tensors[name].detach().clone())
                self.shapes[f"{stream}.{name}"] = list(tensors[name].shape[1:])

    def transcript(self, built: World, samples: int, uploads: int) -> Transcript:
        def stacked(name: str) -> Tensor | None:
            if name not in self.seen:
                return None
            every = torch.cat(self.seen[name])
            return every.reshape(uploads, samples, *every.shape[1:])

        activations, gradients, labels = map(stacked, ("activations-up.x", "gradients-up.x", "activations-up.labels"))
        assert activations is not None
        size = built.backbone.image_size
        return Transcript(
            activations=activations.float(),
            shape=(3, size, size),
            tokens=built.parts.front.prefix,
            gradients=None if gradients is None else gradients.float(),
            labels=None if labels is None else labels[-1],
            batch=min(samples, built.config.local.batch_size),
        )


def _batches(built: World, ids: Indices) -> Iterator[Batch]:
    size = built.config.local.batch_size
    for start in range(0, len(ids), size):
        yield to_batch(built.data.train, ids[start : start + size], kind="none", stream=0, **built.look)


def _step(built: World, batch: Batch, noise: int, recorder: _Recorder) -> None:
    """A step of training on `batch` that moves nothing, with the server's end of its wire recorded."""
    config, vanilla = built.config, built.config.cut.shape == "vanilla"
    client = Client(
        front=built.parts.front,
        tail=built.parts.tail,
        link=Link(built.codecs),
        optimizer=PartOptimizer(built.client, config.optimizer, 0.0),
        front_trains=bool(built.trains.front),
        body_trains=bool(built.trains.body),
        open=built.open,
    )
    server = LocalBody(
        body=built.parts.body,
        tail=built.parts.tail if vanilla else None,
        link=Link(built.codecs, tap=recorder),
        optimizer=PartOptimizer(built.server, config.optimizer, 0.0),
        trains=bool(built.server),
        client_trains=bool(built.trains.front),
        open=built.open,
    )
    built.train(True)
    (vanilla_step if vanilla else u_shape_step)(client, server, batch, noise)
    for stream, size in client.link.sizes.items():
        if size and stream.endswith("-up"):
            recorder.sizes[stream] = recorder.sizes.get(stream, 0) + size
