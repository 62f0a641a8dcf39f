"""A pre-training run in memory: one step, one row of the log, one checkpoint, the weights at the end."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsplit.data import sources
from fedsplit.front.models import SHIPPED_MEAN, SHIPPED_STD, Backbone, load_weights
from fedsplit.layout import pick_device
from fedsplit.pretrain import checkpoint, recipe
from fedsplit.pretrain.recipe import Pretrain
from fedsplit.pretrain.views import mix, views
from fedsplit.rng import key, torch_rng
from fedsplit.runs import RunFolder
from fedsplit.settings import Data
from fedsplit.types import FedsplitError


class Training:
    """A run in memory: data, network, optimiser, position. Restores itself from `folder`."""

    def __init__(self, settings: Pretrain, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.device = pick_device(settings.device)
        source = Data(source=settings.data, cache=settings.cache, limit=settings.limit, test_limit=1)
        data = sources.load(source, settings.scaled)
        # The other part of either size is not needed, so only one image of it is decoded.
        whole = dataclasses.replace(source, limit=1, test_limit=0)
        self.train, self.test = data.train, sources.load(whole, settings.image_size).test
        self.data_name, self.classes = data.name, len(data.classes)
        self.batch = min(settings.batch_size, len(self.train))
        self.per_epoch = len(self.train) // self.batch
        self.model = cast(nn.Module, recipe.network(settings, self.classes).to(self.device))
        self.optimizer = recipe.optimizer(settings, self.model)
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.position = checkpoint.Position()
        self.saved_s = 0.0
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self._restore()

    @property
    def progress(self) -> float:
        """How much of the run is over, 0 to 1."""
        return recipe.progress(self.settings, self.position.step, self.per_epoch, self.position.trained_s)

    @property
    def backbone(self) -> Backbone:
        """The network as the rest of fedsplit sees it."""
        return Backbone(self.model, self.settings.image_size, SHIPPED_MEAN, SHIPPED_STD)

    def step(self) -> float:
        """One optimiser step; returns its learning rate."""
        began = time.perf_counter()
        settings, position = self.settings, self.position
        stream = key(settings.seed, "step", position.step)
        lr = recipe.schedule(settings, self.model, self.optimizer, self.progress)
        rows = self._rows()
        pixels = torch.from_numpy(np.asarray(self.train.pixels[rows])).to(self.device)
        labels = torch.from_numpy(np.asarray(self.train.labels[rows])).to(self.device)
        x, target = mix(views(pixels, settings, stream), labels, self.classes, settings, stream)
        # Patch dropout draws from torch's own generator.
        torch.manual_seed(key(stream, "patches"))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.amp and self.device.type == "cuda"):
            logits = self.model(x)
        loss = F.cross_entropy(logits.float(), target)
        self.optimizer.zero_grad()
        loss.backward()
        if settings.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        self.optimizer.step()
        self.loss += loss.detach()
        position.step += 1
        position.trained_s += time.perf_counter() - began
        return lr

    def row(self, lr: float) -> dict[str, Any]:
        """A row of the log: the mean loss and the speed since the last one, and the accuracy now."""
        from fedsplit.pretrain.probe import top1

        position = self.position
        mean = self._finite_loss() / (position.step - position.row_step)
        speed = (position.step - position.row_step) * self.batch / max(1e-9, position.trained_s - position.row_s)
        row = {
            "step": position.step,
            "epoch": round(position.step / self.per_epoch, 3),
            "lr": lr,
            "loss": round(mean, 5),
            "images_per_s": round(speed, 1),
            "val_accuracy": round(top1(self.backbone, self.test), 5),
        }
        RunFolder(self.folder).append("log", [row])
        position.row_step, position.row_s = position.step, position.trained_s
        self.loss.zero_()
        return row

    def save(self) -> None:
        """Write a checkpoint."""
        self._finite_loss()
        checkpoint.save(self.folder, self.position, self.loss, self.model, self.optimizer)
        self.saved_s = self.position.trained_s

    def export(self) -> Path:
        """Write the weights, load them back from the file, and return its path."""
        path = self.folder / f"{self.settings.title}.safetensors"
        kind = torch.float16 if self.settings.half else torch.float32
        state = {name: value.detach().cpu().to(kind).contiguous() for name, value in self.model.state_dict().items()}
        checkpoint.write_bytes(path, safetensors.torch.save(state))
        load_weights(self.model, path)
        return path

    def _rows(self) -> npt.NDArray[np.int64]:
        """The samples of this step; every epoch has its own order, and leaves out an incomplete last batch."""
        epoch, place = divmod(self.position.step, self.per_epoch)
        if self._order[0] != epoch:
            stream = torch_rng(key(self.settings.seed, "order", epoch))
            self._order = epoch, torch.randperm(len(self.train), generator=stream)
        rows = self._order[1][place * self.batch : (place + 1) * self.batch]
        chosen: npt.NDArray[np.int64] = rows.numpy()
        return chosen

    def _restore(self) -> None:
        found = checkpoint.restore(self.folder, self.model, self.optimizer)
        if found:
            self.position, loss = found
            self.loss = loss.to(self.device)
            self.saved_s = self.position.trained_s
        RunFolder(self.folder).trim("log", "step", self.position.step)

    def _finite_loss(self) -> float:
        total = float(self.loss)
        if not np.isfinite(total):
            raise FedsplitError(f"The loss is no finite number by step {self.position.step}; set a smaller lr.")
        return total
