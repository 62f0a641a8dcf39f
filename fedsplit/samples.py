"""A device's own samples: as batches for a step, and as a selector sees them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedsplit.data.batches import to_batch
from fedsplit.types import Batch, Job, Tensors
from fedsplit.world import Indices, World

HELD = "held"


class Stock:
    """The samples of one device in one round, and what passed through its front.

    `computed` counts the samples whose frozen part was not kept from an earlier pass. What a device
    keeps is its own account, whoever else shares this process.
    """

    def __init__(self, world: World, job: Job, memory: Tensors) -> None:
        self.world = world
        self.shard = world.shards[job.client]
        self.computed = 0
        self._held: set[int] = set()
        self._fits: set[int] = set()
        if world.cache is not None:
            self._fits = set(self.shard[world.cache.fits(len(self.shard), job.client)].tolist())
            held = memory.get(HELD, torch.zeros(len(self.shard), dtype=torch.uint8))
            self._held = set(self.shard[held.bool().numpy()].tolist())

    def batch(self, indices: Indices, stream: int) -> Batch:
        """The samples `indices` (B,), augmented by `stream`; tokens where the front's were kept."""
        self.computed += sum(int(index) not in self._held for index in indices)
        self._held |= self._fits.intersection(indices.tolist())
        world = self.world
        if world.cache is None:
            return to_batch(world.data.train, indices, kind=world.config.data.augment, stream=stream, **world.look)
        tokens = world.cache.tokens(indices)
        labels = torch.from_numpy(world.data.train.labels[indices]).to(tokens.device)
        return Batch(tokens, labels, torch.from_numpy(indices).to(tokens.device))

    @property
    def stored_bytes(self) -> int:
        """What the front outputs take that the device keeps now, in bytes."""
        return 0 if self.world.cache is None else len(self._held) * self.world.cache.sample_bytes

    def memory(self) -> Tensors:
        """Which samples' front outputs the device holds now, (S,) uint8."""
        if self.world.cache is None:
            return {}
        return {HELD: torch.from_numpy(np.isin(self.shard, sorted(self._held)).astype(np.uint8))}


class View:
    """A device's samples as its selectors see them; nothing of it leaves the device."""

    def __init__(self, stock: Stock) -> None:
        self._stock = stock
        self._seen: tuple[Tensor, Tensor] | None = None
        self.labels = torch.from_numpy(stock.world.data.train.labels[stock.shard])
        self.classes = len(stock.world.data.classes)

    def logits(self) -> Tensor:
        """(S, classes): front joined to tail, without the body, in evaluation mode."""
        return self._look()[0]

    def features(self) -> Tensor:
        """(S, C): the mean patch token of the front's output."""
        return self._look()[1]

    @property
    def scored(self) -> int:
        """How many samples the model has looked at."""
        return 0 if self._seen is None else len(self.labels)

    def _look(self) -> tuple[Tensor, Tensor]:
        if self._seen is None:
            world, shard = self._stock.world, self._stock.shard
            size = world.config.eval.batch_size
            world.train(False)
            with torch.inference_mode():
                pairs = [self._pair(shard[start : start + size]) for start in range(0, len(shard), size)]
            world.train(True)
            logits, features = (torch.cat(part).float().cpu() for part in zip(*pairs, strict=True))
            self._seen = (logits, features)
        return self._seen

    def _pair(self, indices: Indices) -> tuple[Tensor, Tensor]:
        world = self._stock.world
        batch = self._stock.batch(indices, 0)
        front = world.parts.front
        h = front(batch.x, start=world.start)
        return world.short(h), front.feature(h)
