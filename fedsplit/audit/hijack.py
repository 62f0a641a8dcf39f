"""The clients' training under a malicious server, for attacks that lead it astray (FSHA, arXiv 2012.02670)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fedsplit.data.batches import batches, to_batch
from fedsplit.front.vit import Part, split
from fedsplit.layout import pooling
from fedsplit.optim import PartOptimizer
from fedsplit.wire.link import Link
from fedsplit.world import Indices, World


class Misled:
    """Clients in turn that train a copy of the front by whatever gradients come down (`attacks.base.Hijack`).

    They begin with the weights of the model in `built` and its optimiser; a front that does not train stays
    as it is. All devices' samples are dealt in shuffled batches, as in a sequential schedule.
    """

    def __init__(self, built: World, victims: Indices) -> None:
        self.built, self._victims = built, victims
        vit: Any = copy.deepcopy(built.backbone.vit)
        self.front: Part = split(vit, built.cut, pooling(built.config, vit, built.cut)).front
        named = {name: p for name, p in self.front.named().items() if name in built.trains.front}
        for name, parameter in self.front.named().items():
            parameter.requires_grad_(name in named)
        self.optimizer = PartOptimizer(named, built.config.optimizer, built.config.optimizer.lr)
        self.link, self.server = Link(built.codecs), Link(built.codecs)
        self._pool = torch.cat([torch.from_numpy(shard) for shard in built.shards]).numpy()
        self._order: Iterator[Indices] = iter(())
        self._epoch = self._steps = 0
        self._h = torch.zeros(0)

    def upload(self) -> Tensor:
        """Activations (B, N, C) of the next batch, as the server decodes them."""
        indices = next(self._order, None)
        if indices is None:
            stream = self.built.key("audit", "hijack", self._epoch)
            self._order = batches(self._pool, self.built.config.local.batch_size, stream)
            self._epoch += 1
            indices = next(self._order)
        self._steps += 1
        self._h = self._look(indices, self._steps)
        return self._sent(self._h)

    def answer(self, gradient: Tensor) -> None:
        """A gradient (B, N, C) for the last batch; the clients' optimiser takes its step by it."""
        if not self._h.requires_grad:
            return
        self.optimizer.zero_grad()
        self._h[:, self.built.open].backward(gradient[:, self.built.open].to(self._h.device))
        self.optimizer.step()

    def victims(self) -> Tensor:
        """Activations (S, N, C) of the samples under attack, as the front is now."""
        with torch.no_grad():
            return self._sent(self._look(self._victims, 0))

    def _look(self, indices: Indices, step: int) -> Tensor:
        self.front.train(True)
        batch = to_batch(self.built.data.train, indices, kind="none", stream=0, **self.built.look)
        activations: Tensor = self.front(batch.x, self.built.key("audit", "hijack-noise", step))
        return activations

    def _sent(self, h: Tensor) -> Tensor:
        frame = self.link.encode("activations-up", {"x": h})
        return self.server.decode("activations-up", frame)["x"].float()
