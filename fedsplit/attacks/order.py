"""Shuffled patch tokens, put back in order by what each token says of its place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsplit import rng
from fedsplit.attacks.base import Query
from fedsplit.attacks.decoders import drawn, layer
from fedsplit.attacks.work import Work, adam, cosine

CHUNK = 250
DAMPING = 1e-4


@dataclass(frozen=True)
class Order:
    """Puts the patch tokens of activations in order by `scores` (B, P, P), of token by place.

    `right` is the fraction of tokens that it placed right in images that it was not fitted to.
    """

    scores: Callable[[Tensor], Tensor]
    prefix: int
    right: float

    def __call__(self, seen: Tensor) -> Tensor:
        """Activations (B, N, C) in order."""
        with torch.no_grad():
            return torch.cat([placed(part, self.scores(part), self.prefix) for part in seen.split(CHUNK)])


def in_order(query: Query, front: Callable[[Tensor], Tensor], prefix: int) -> Query:
    """`query`, each of whose patch tokens is put where the front, which the attacker knows, has the one nearest it."""

    def ask(images: Tensor, key: int) -> Tensor:
        with torch.no_grad():
            seen, known = query(images, key), front(images)
            return placed(seen, -torch.cdist(seen[:, prefix:], known[:, prefix:]), prefix)

    return ask


def learned(tokens: Tensor, prefix: int, epochs: int, batch: int, width: int, key: int, work: Work) -> Order:
    """The order that is learned from activations `tokens` (A, N, C) in their right order.

    A Gaussian for every place, of one covariance (linear discriminant analysis), and what a small transformer, which
    sees all tokens of an image and not their order, adds to its scores. The last fifth of the images is held out.
    """
    patches = tokens[:, prefix:]
    kept = max(1, len(patches) * 4 // 5)
    level, spread = patches.mean((0, 1)), patches.std((0, 1), correction=0)
    spread = spread.masked_fill(spread <= 1e-6 * level.abs(), torch.inf)

    def seen(x: Tensor) -> Tensor:
        """What is read of tokens (B, P, C): themselves less the image's mean token, and that mean."""
        x = (x - level) / spread
        mean = x.mean(1, keepdim=True)
        return torch.cat([x - mean, mean.expand_as(x)], 2)

    inputs = seen(patches[:kept])
    weight, bias = _discriminant(inputs)
    net = drawn(lambda: Places(inputs.shape[2], patches.shape[1], width), key, patches)
    places = torch.arange(patches.shape[1], device=patches.device)
    per_epoch = math.ceil(kept / batch)

    def loss(step: int) -> Tensor:
        epoch, number = divmod(step, per_epoch)
        order = torch.randperm(kept, generator=rng.torch_rng(rng.key(key, "order", epoch)))
        x = inputs[order[number * batch : (number + 1) * batch].to(inputs.device)]
        return F.cross_entropy((x @ weight + bias + net(x)).flatten(0, 1), places.repeat(len(x)))

    steps = epochs * per_epoch
    work.descend("places of tokens", dict(net.named_parameters()), loss, steps, adam(0.001), rate=cosine(steps))

    def scores(x: Tensor) -> Tensor:
        inputs = seen(x[:, prefix:])
        found: Tensor = inputs @ weight + bias + net(inputs)
        return found

    with torch.no_grad():
        held = [chosen(scores(part)) for part in tokens[kept:].split(CHUNK)]
    right = float((torch.cat(held) == places).float().mean()) if len(tokens) > kept else 0.0
    return Order(scores, prefix, right)


def placed(seen: Tensor, scores: Tensor, prefix: int) -> Tensor:
    """Activations (B, N, C) whose P patch tokens are where `scores` (B, P, P), of token by place, want them."""
    patches = seen[:, prefix:]
    order = chosen(scores)[:, :, None].expand(-1, -1, seen.shape[2])
    return torch.cat([seen[:, :prefix], patches.gather(1, order)], 1)


def chosen(scores: Tensor) -> Tensor:
    """Which token (B, P) each place gets, by `scores` (B, P, P) of token by place: the best left pair at each turn."""
    left = scores.clone()
    count, rows = left.shape[1], torch.arange(len(left), device=left.device)
    found = torch.zeros(left.shape[:2], dtype=torch.int64, device=left.device)
    for _ in range(count):
        best = left.flatten(1).argmax(1)
        token, place = best // count, best % count
        found[rows, place] = token
        left[rows, token] = -torch.inf
        left[rows, :, place] = -torch.inf
    return found


class Places(nn.Module):
    """Scores (B, P, places) of tokens (B, P, F), each by itself and all others, in whatever order they come."""

    def __init__(self, features: int, places: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(features, width)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer(width)), 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, places)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of tokens."""
        scores: Tensor = self.leave(self.norm(self.layers(self.enter(x))))
        return scores


def _discriminant(x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (F, P) and biases (P,) of linear discriminant scores of places, from tokens (A, P, F) in their places."""
    means = x.double().mean(0)
    left = (x.double() - means).flatten(0, 1)
    covariance = left.T @ left / len(left)
    damping = DAMPING * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    weight = torch.linalg.solve(covariance + damping * torch.eye(len(covariance)).to(covariance), means.T)
    return weight.float(), (-0.5 * (means.T * weight).sum(0)).float()
