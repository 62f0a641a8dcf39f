"""A hardening in memory: one epoch, the removal, one checkpoint, the weights at the end."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsplit.config import Config
from fedsplit.data.batches import batches, to_batch
from fedsplit.data.sources import load
from fedsplit.front import models, prune
from fedsplit.front.masks import Masks
from fedsplit.front.vit import Parts, split
from fedsplit.harden import checkpoint, recipe
from fedsplit.layout import address, pick_device
from fedsplit.metrics.flops import count, counting_copy
from fedsplit.metrics.quality import evaluate
from fedsplit.optim import PartOptimizer
from fedsplit.rng import key, torch_rng
from fedsplit.runs import RunFolder
from fedsplit.tail.losses import cross_entropy
from fedsplit.types import Cut, FedsplitError, Tensors
from fedsplit.world import Indices


class Training:
    """Data, model, masks, penalties and their memory, optimiser, position. Restores itself from `folder`.

    What `front.edits` add to the model (prompts, say) stays as drawn and is no part of the checkpoint that comes
    out: it belongs to the run, which draws its own.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.device = pick_device(config.device)
        self.data = load(config.data, models.input_size(config.model))
        self.indices = self._chosen()
        self.penalties: dict[str, Any] = dict(
            zip(config.names("front.penalties"), config.pieces("front.penalties"), strict=True)
        )
        self.masks: Masks | None = None
        self.memory: dict[str, Any] = {}
        self.position = checkpoint.Position()
        backbone = models.create(config.model, len(self.data.classes), config.seed)
        self._place(backbone, address(config, backbone.depth))
        recipe.check(config, self.cut)
        if not self._restore():
            self.position.figures = {"before": self.size() | {"accuracy": self.accuracy()}}
            if recipe.prunes(config):
                self._mask()

    @property
    def phase(self) -> recipe.Phase:
        """What the next epoch belongs to."""
        return recipe.phases(self.config)[self.position.removed]

    @property
    def over(self) -> bool:
        """Whether all epochs are done, and the removal."""
        return self.position.removed and self.position.epoch == self.phase.last

    def epoch(self) -> dict[str, Any]:
        """One pass over the images; returns its row of the table.

        Raises:
            FedsplitError: a loss that is no finite number.
        """
        number, sums = self.position.epoch, dict[str, float]()
        stream = key(self.config.seed, "harden", number)
        for step, rows in enumerate(batches(self.indices, self.config.harden.batch_size, key(stream, "order"))):
            for name, value in self._step(rows, key(stream, step)).items():
                sums[name] = sums.get(name, 0.0) + value * len(rows)
        means = {name: round(total / len(self.indices), 6) for name, total in sums.items()}
        l1 = self.config.harden.l1 * self.masks.norm() if self.masks else 0.0
        row = {"epoch": number + 1, "phase": self.phase.name, **means, "l1": round(l1, 6), **self.left()}
        row["accuracy"] = round(self.accuracy(), 5)
        self.position.epoch += 1
        return row

    def remove(self) -> None:
        """Take out what the masks gave up, and start the optimiser and the penalties' memory anew."""
        figures, config = self.position.figures, self.config
        if self.masks:
            figures["masked"] = {"accuracy": self.accuracy()}
            whole = self.plain(prune.shape_of(self.backbone.vit))
            whole.vit.load_state_dict(self.state())
            masks = Masks(whole.vit, self.masks.numbers)
            masks.load(self.masks.state())
            prune.settle(whole.vit, masks, recipe.keep(config), key(config.seed, "harden", "settle"))
            shape = prune.remove(whole.vit, masks)
            gone = self.cut.depth - len(shape.blocks)
            self._fill(shape, Cut(self.cut.front - gone, self.cut.tail, len(shape.blocks)), whole.vit.state_dict())
        self.masks, self.memory = None, {}
        self.position.removed = True
        self._optimizer = self._make_optimizer()
        figures["removed"] = self.size() | {"accuracy": self.accuracy()}

    def accuracy(self) -> float:
        """On the test split, 0 to 1."""
        test, look = self.data.test, {"mean": self.backbone.mean, "std": self.backbone.std, "device": self.device}
        every = np.arange(len(test))
        size = self.config.eval.batch_size
        return evaluate(self.parts, test, every, len(self.data.classes), batch_size=size, **look).accuracy  # type: ignore[arg-type]

    def chance(self) -> float:
        """The share of the test split's commonest class."""
        return float(np.bincount(self.data.test.labels).max() / len(self.data.test))

    def size(self) -> dict[str, Any]:
        """Parameters, and FLOPs of one image forward, of model and front; blocks of the front with their widths."""
        vit: Any = self.backbone.vit
        ghost, side = split(counting_copy(vit), self.cut), self.backbone.image_size
        image = torch.empty(1, 3, side, side, device="meta")
        with torch.no_grad():
            tokens, front = count(lambda: ghost.front(image))
            _, rest = count(lambda: ghost.tail(ghost.body(tokens)))
        named = self.parts.front.named()
        return {
            "parameters": sum(value.numel() for value in self._own.values()),
            "front_parameters": sum(value.numel() for value in named.values() if value.requires_grad),
            "flops": front + rest,
            "front_flops": front,
            "depth": self.cut.depth,
            "front": self.cut.front,
            "heads": [_at(block, "attn.num_heads") for block in vit.blocks[: self.cut.front]],
            "mlp": [_at(block, "mlp.fc2.in_features") for block in vit.blocks[: self.cut.front]],
        }

    def left(self) -> dict[str, int]:
        """By kind, the structures of the front that are not masked out."""
        if self.masks:
            return self.masks.left()
        blocks = [self.parts.front.block(number) for number in self.parts.front.numbers]
        heads, mlp = (sum(_at(block, of) for block in blocks) for of in ("attn.num_heads", "mlp.fc2.in_features"))
        return {"heads": heads, "mlp": mlp, "blocks": len(blocks)}

    def state(self) -> Tensors:
        """The model as its file holds it, without what edits added; the values that train, not copies."""
        return {name: value.detach() for name, value in self._own.items()}

    def save(self) -> None:
        """Write a checkpoint."""
        kept = {name: _piece(self.penalties[name], "pack", held) for name, held in self.memory.items()}
        tensors = {"model": self.state(), "masks": self.masks.state() if self.masks else {}}
        shape = prune.shape_of(self.backbone.vit)
        about = shape.metadata()[prune.METADATA] if shape else ""
        checkpoint.save(self.folder, self.position, tensors | {"optimizer": self._optimizer.state()}, about, kept)

    def finite(self) -> bool:
        """Whether every weight is a finite number."""
        return all(bool(value.isfinite().all()) for value in self._own.values() if value.is_floating_point())

    def _step(self, rows: Indices, stream: int) -> dict[str, float]:
        """One step down the task's loss and the penalties; what they were, by name."""
        look = (self.backbone.mean, self.backbone.std)
        images, noise = self.data.train, key(stream, "noise")
        batch = to_batch(images, rows, *look, self.config.data.augment, key(stream, "augment"), self.device)
        self._optimizer.zero_grad()
        h = self.parts.front(batch.x, noise)
        terms: dict[str, Tensor] = {}
        for name, piece in self.penalties.items():
            draw = key(noise, "penalty", type(piece).__name__)  # as in `step.Client`: the order draws nothing else
            term, self.memory[name] = piece.penalty(self.parts.front, batch.x, h, self.memory.get(name), draw)
            terms[f"penalty.{name}"] = term
        task = cross_entropy(self.parts.tail(self.parts.body(h, noise), noise), batch.y)
        loss = sum(terms.values(), start=task)
        found = {"loss": loss.item(), "task_loss": task.item(), **{name: term.item() for name, term in terms.items()}}
        odd = [name for name, value in found.items() if not math.isfinite(value)]
        if odd:
            blame = f" ({odd[-1]} first)" if len(odd) < len(found) else ""
            raise FedsplitError(
                f"The loss is no finite number in epoch {self.position.epoch + 1}{blame}: the defence diverged; lower "
                "harden.lr or the weights of front.penalties."
            )
        if self.masks:
            self.masks.zero_grad()
        loss.backward()
        self._optimizer.step()
        if self.masks:
            self.masks.step(self.config.harden.mask_lr, self.config.harden.l1)
        return found

    def _chosen(self) -> Indices:
        total, most = len(self.data.train), self.config.harden.images
        if not most or most >= total:
            return np.arange(total)
        drawn = torch.randperm(total, generator=torch_rng(key(self.config.seed, "harden", "images")))
        return np.sort(drawn[:most].numpy())

    def _place(self, backbone: models.Backbone, cut: Cut) -> None:
        """Take `backbone` as the model: with the edits of the front, cut, and with an optimiser."""
        config = self.config
        own: Tensors = backbone.vit.to(self.device).state_dict(keep_vars=True)
        for name, piece in zip(config.names("front.edits"), config.pieces("front.edits"), strict=True):
            piece.edit(backbone.vit, cut, key(config.seed, "front.edits", name))
        backbone.vit.to(self.device)  # and what the edits added
        self.backbone, self.cut, self._own = backbone, cut, own
        self.parts: Parts = split(backbone.vit, cut)
        self.parts.train()
        trained = {id(value) for value in own.values()}
        self._named = {}
        for name, parameter in backbone.vit.named_parameters():
            parameter.requires_grad_(id(parameter) in trained)
            if parameter.requires_grad:
                self._named[name] = parameter
        self._optimizer = self._make_optimizer()

    def _mask(self) -> Masks:
        self.masks = Masks(self.backbone.vit, range(self.cut.front), recipe.kinds(self.config))
        return self.masks

    def _make_optimizer(self) -> PartOptimizer:
        return PartOptimizer(self._named, self.config.optimizer, self.phase.lr)

    def plain(self, shape: prune.Shape | None) -> models.Backbone:
        """The backbone of `shape` without edits, its weights as drawn."""
        bare = replace(self.config.model, checkpoint="", pretrained=False)
        backbone = models.create(bare, len(self.data.classes), self.config.seed)
        if shape:
            prune.shape_as(backbone.vit, shape)
        return backbone

    def _fill(self, shape: prune.Shape | None, cut: Cut, state: Tensors) -> None:
        backbone = self.plain(shape)
        backbone.vit.load_state_dict(state)
        self._place(backbone, cut)

    def _restore(self) -> bool:
        found = checkpoint.read(self.folder)
        RunFolder(self.folder).trim("epochs", "epoch", found[0].epoch if found else 0)
        if found is None:
            return False
        self.position, state = found
        shape = prune.Shape.read(state["shape"]) if state["shape"] else None
        gone = self.cut.depth - (len(shape.blocks) if shape else self.cut.depth)
        self._fill(shape, Cut(self.cut.front - gone, self.cut.tail, self.cut.depth - gone), state["model"])
        self._optimizer.load(state["optimizer"])
        self.memory = {name: _piece(self.penalties[name], "unpack", held) for name, held in state["memory"].items()}
        if state["masks"]:
            self._mask().load(state["masks"])
        return True


def _at(block: Any, path: str) -> int:
    """A number in a block; 0 where a block of another kind has none."""
    for name in path.split("."):
        block = getattr(block, name, 0)
    return int(block)


def _piece(piece: Any, method: str, held: Any) -> Any:
    change = getattr(piece, method, None)
    return held if change is None else change(held)
