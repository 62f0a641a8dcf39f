"""What the learned attacks share: features on one scale, and a decoder fitted to the attacker's own images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsplit import rng
from fedsplit.attacks.base import Knowledge, Query, Transcript
from fedsplit.attacks.decoders import KINDS, decoder, drawn
from fedsplit.attacks.order import in_order, learned
from fedsplit.attacks.ridge import Ridge, fitted, unfitted
from fedsplit.attacks.work import Work, adam, cosine
from fedsplit.types import knob

CHUNK = 250
FAR = 30.0
STILL = 1e-6
MOVED = 0.1
MOST = 0.5
Pairs = Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation (N, C) of features, by which every rescaling of a front's output is undone."""

    mean: Tensor
    std: Tensor

    @staticmethod
    def of(features: Tensor, alike: int | None = None) -> Scale:
        """That of `features` (A, N, C), by token and channel; tokens from `alike` on share one, where it is given.

        A channel that stays the same, up to rounding, counts as 0: its deviation is infinite.
        """
        # In float64, and the bound relative to the channel: a power of two then cancels exactly.
        mean, std = _moments(features.double(), 0)
        if alike is not None:
            mean[alike:], std[alike:] = _moments(features[:, alike:].double(), (0, 1))
        return Scale(mean, _moving(std, mean))

    @staticmethod
    def level(features: Tensor) -> Scale:
        """That of few `features` (S, N, C): means by token and channel, deviations by channel."""
        mean = features.double().mean(0)
        std = (features - mean).square().mean((0, 1)).sqrt().expand_as(mean).clone()
        return Scale(mean, _moving(std, mean))

    def apply(self, features: Tensor) -> Tensor:
        """`features` (B, N, C) standardised, float32."""
        return ((features - self.mean) / self.std).float()

    def undo(self, standardised: Tensor) -> Tensor:
        """The features (B, N, C) that `apply` makes `standardised`."""
        return (self.mean + standardised * self.std.nan_to_num(posinf=0)).float()

    def __call__(self, features: Tensor) -> Tensor:
        """`features` (B, N, C) standardised, float32; what is far out of range is cut off."""
        return self.apply(features).clamp(-FAR, FAR)


@dataclass(frozen=True)
class Fit:
    """The knobs of an attack that trains a decoder."""

    decoder: str = knob(
        "auto",
        "the network: auto is conv, or slots for shuffled tokens that cannot be put in order",
        choices=("auto", *KINDS),
    )
    epochs: int = knob(30, "passes over the attacker's images", low=1)
    lr: float = knob(0.001, "learning rate of Adam at first; it falls to 0 as a cosine", above=0.0)
    batch: int = knob(32, "images a step", low=1)
    width: int = knob(64, "channels of the decoder, a multiple of 32", low=32)

    def fit(
        self, pairs: Pairs, draws: int, transcript: Transcript, key: int, work: Work, shuffled: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """A decoder of activations (S, N, C) to images (S, 3, height, width) in [0, 1], fitted to `pairs`.

        `pairs(draw)` are images (A, 3, height, width) and their features (A, N, C); epochs go through draws 0 to
        `draws - 1` in turn, and the first says the scale. The network learns what the best linear map leaves.
        """
        images, features = pairs(0)
        kind = self.decoder if self.decoder != "auto" else "slots" if shuffled else "conv"
        prefix, ordered = transcript.tokens, kind != "slots"
        tokens = (features.shape[1], features.shape[2])
        net = drawn(lambda: decoder(kind, tokens, prefix, transcript.shape, self.width), key, features)
        if ordered:
            scale, line = _best(features, images, prefix)
        else:
            scale, line = Scale.of(features, alike=prefix), unfitted(features, images, prefix)
        first = scale(features)
        held = {0: (first, images - line(first))}
        per_epoch = math.ceil(len(images) / self.batch)

        def loss(step: int) -> Tensor:
            epoch, number = divmod(step, per_epoch)
            draw = epoch * draws // self.epochs
            if draw not in held:
                held.clear()
                seen = scale(pairs(draw)[1])
                held[draw] = (seen, images - line(seen))
            order = torch.randperm(len(images), generator=rng.torch_rng(rng.key(key, "order", epoch)))
            chosen = order[number * self.batch : (number + 1) * self.batch].to(features.device)
            seen, left = (part[chosen] for part in held[draw])
            return F.mse_loss(net(seen), left)

        steps = self.epochs * per_epoch
        named = dict(net.named_parameters())
        work.descend(f"{kind} decoder", named, loss, steps, adam(self.lr), rate=cosine(steps))
        return lambda seen: decode(lambda z: line(z) + net(z), scale(seen))


@dataclass(frozen=True)
class Queried(Fit):
    """The knobs of an attack that trains a decoder on queries."""

    draws: int = knob(10, "queries of each image where the front is random; epochs take them in turn", low=1)

    def invert(self, transcript: Transcript, uploads: Tensor, knowledge: Knowledge, key: int, work: Work) -> Tensor:
        """Images of the mean of `uploads` (R, S, N, C), by a decoder of the means of as many queries.

        Where queries show that tokens come in no order, and the front is known, they are first put in order by what
        each says of its place; with decoder "auto" only if most places are then right.
        """
        query, images, prefix = knowledge.query, knowledge.auxiliary, transcript.tokens
        assert query is not None and images is not None
        one, two = answers(query, images, rng.key(key, "random"))
        random = not torch.equal(one, two)
        times, draws = (len(uploads), self.draws) if random else (1, 1)
        shuffled = random and is_shuffled(one, two)
        if shuffled and knowledge.front is not None and self.decoder != "slots":
            ask = in_order(query, knowledge.front, prefix)
            tokens = asked(ask, images, rng.key(key, "order"))
            order = learned(tokens, prefix, self.epochs, self.batch, self.width, rng.key(key, "places"), work)
            if self.decoder != "auto" or order.right > MOST:
                query, shuffled = ask, False
                uploads = torch.stack([order(seen) for seen in uploads])

        def pairs(draw: int) -> tuple[Tensor, Tensor]:
            return images, asked(query, images, rng.key(key, "draw", draw), times)

        return self.fit(pairs, draws, transcript, key, work, shuffled)(uploads.mean(0))


def _best(features: Tensor, images: Tensor, prefix: int) -> tuple[Scale, Ridge]:
    """The scale that serves a linear map best, with that map: deviations by token, or the same for all tokens."""
    scales = (Scale.of(features), Scale.level(features))
    found = [fitted(scale(features), images, prefix) for scale in scales]
    errors = [error for _, error in found]
    best = errors.index(min(errors))
    return scales[best], found[best][0]


def decode(net: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """Images of `features` (S, N, C), in [0, 1] and without gradients."""
    with torch.no_grad():
        return torch.cat([net(part) for part in features.split(CHUNK)]).clamp(0, 1)


def asked(query: Query, images: Tensor, key: int, uploads: int = 1) -> Tensor:
    """The mean (A, N, C) of `uploads` uploads of `images`, drawn by `key`."""
    chunks = []
    with torch.no_grad():
        for number, part in enumerate(images.split(CHUNK)):
            total = query(part, rng.key(key, number, 0))
            for upload in range(1, uploads):
                total = total + query(part, rng.key(key, number, upload))
            chunks.append(total / uploads)
    return torch.cat(chunks)


def answers(query: Query, images: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """Two answers to the first of `images`, a draw each."""
    few = images[:4]
    with torch.no_grad():
        return query(few, rng.key(key, "one")), query(few, rng.key(key, "two"))


def is_shuffled(one: Tensor, two: Tensor) -> bool:
    """Whether two answers (B, N, C) hold the same tokens in another order."""
    apart = torch.cdist(one.double(), two.double())
    moved = apart.argmin(2) != torch.arange(one.shape[1], device=one.device)
    in_place, nearest = apart.diagonal(dim1=1, dim2=2)[moved], apart.amin(2)[moved]
    return bool(moved.float().mean() > MOVED and (nearest < in_place.mean() / 2).all())


def _moments(features: Tensor, over: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return features.mean(over), features.std(over, correction=0)


def _moving(std: Tensor, mean: Tensor) -> Tensor:
    return std.masked_fill(std <= STILL * (std**2 + mean**2).sqrt(), torch.inf)
