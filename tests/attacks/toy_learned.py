"""Tiny smooth images and fronts whose inverse is known, for the tests of the learned attacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from fedsplit.attacks.base import Knowledge, Transcript
from fedsplit.rng import key, torch_rng

SHAPE = (3, 16, 16)
STEP = 4

Front = Callable[[Tensor, int], Tensor]


def pictures(count: int, name: str) -> Tensor:
    """Smooth images (count, 3, 16, 16) in [0, 1]: bright spots on dark, more above; no colour is like another."""
    source = torch_rng(key(0, name))
    coarse = torch.randn(count, 1, 4, 4, generator=source) + 0.5 * torch.randn(count, 3, 4, 4, generator=source)
    coarse = coarse + torch.linspace(1, -1, 4).view(4, 1)
    spots = torch.sigmoid(2 * F.interpolate(coarse, size=16, mode="bicubic"))
    return spots ** torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)


AUXILIARY, VICTIMS = pictures(160, "auxiliary"), pictures(24, "victims")
MEAN = AUXILIARY.mean(0).expand_as(VICTIMS)


def identity(images: Tensor, key: int) -> Tensor:
    """Tokens (B, 16, 48) that are the pixels of the patches."""
    return F.pixel_unshuffle(images, STEP).flatten(2).transpose(1, 2)


def constant(images: Tensor, key: int) -> Tensor:
    """Tokens (B, 16, 48) that are the same for every image."""
    return torch.linspace(-1, 1, 48).expand(len(images), 16, 48)


def noisy(images: Tensor, key: int) -> Tensor:
    """The identity with Gaussian noise, drawn anew by every key."""
    tokens = identity(images, key)
    return tokens + 0.5 * torch.randn(tokens.shape, generator=torch_rng(key))


def shuffled(images: Tensor, key: int) -> Tensor:
    """The identity with a position embedding, each sample's tokens then in an order of its own."""
    places = torch.randn(16, 48, generator=torch_rng(1))
    tokens = identity(images, key) + places
    order = torch.rand(tokens.shape[:2], generator=torch_rng(key)).argsort(1)
    return tokens.gather(1, order[..., None].expand_as(tokens))


def curved(images: Tensor, key: int) -> Tensor:
    """Tokens (B, 16, 96): each pixel as a place on a circle, which no linear map reads well."""
    angles = 5.5 * identity(images, key)
    return torch.cat([angles.sin(), angles.cos()], 2)


def classify(tokens: Tensor) -> Tensor:
    """Logits (B, 8) that depend linearly on all tokens (B, 16, 48)."""
    weight = torch.randn(16 * 48, 8, generator=torch_rng(2))
    return (tokens - 0.5).flatten(1) @ weight


def knows(**granted: Any) -> Knowledge:
    """What an attacker knows, by field of `Knowledge`; `rest` is body and tail at once."""
    if "rest" in granted:
        granted |= {"body": granted.pop("rest"), "tail": lambda logits: logits}
    return Knowledge(**granted)


def asks(front: Front) -> Knowledge:
    """Queries of `front` and auxiliary images."""
    return knows(query=front, auxiliary=AUXILIARY)


def saw(front: Front, uploads: int = 1) -> Transcript:
    """The transcript of so many uploads of the victims."""
    return Transcript(torch.stack([front(VICTIMS, key(7, upload)) for upload in range(uploads)]), SHAPE)


def mse(found: Tensor) -> float:
    """The mean squared error of reconstructions of the victims."""
    return F.mse_loss(found, VICTIMS).item()


def ssim(found: Tensor) -> float:
    """Their mean structural similarity: 11 x 11 Gaussian window, RGB, range 1."""
    value = structural_similarity_index_measure(found, VICTIMS, data_range=1.0)
    assert isinstance(value, Tensor)
    return value.item()


class Clients:
    """Clients whose front is one linear map of the patches, not trained so far."""

    def __init__(self, trains: bool = True) -> None:
        self.front = nn.Linear(48, 48)
        nn.init.normal_(self.front.weight, std=0.05, generator=torch_rng(4))
        nn.init.zeros_(self.front.bias)
        self.optimizer = torch.optim.Adam(self.front.parameters(), lr=0.002 if trains else 0.0)
        self.images = pictures(160, "clients")
        self.sent = torch.empty(0)
        self.turn = 0

    def upload(self) -> Tensor:
        """Activations (32, 16, 48) of the next batch."""
        chosen = torch.randint(len(self.images), (32,), generator=torch_rng(key(3, self.turn)))
        self.turn += 1
        self.sent = self.front(identity(self.images[chosen], 0))
        return self.sent.detach()

    def answer(self, gradient: Tensor) -> None:
        """A step of the clients' optimiser."""
        self.optimizer.zero_grad()
        self.sent.backward(gradient)
        self.optimizer.step()

    def victims(self) -> Tensor:
        """Activations (24, 16, 48) of the victims."""
        with torch.no_grad():
            found: Tensor = self.front(identity(VICTIMS, 0))
        return found
