"""Structures that leave a model for good: heads, MLP hidden units and whole blocks that a mask zeroed.

The smaller model has fewer rows in `qkv` and `fc1`, fewer columns in `proj` and `fc2`, fewer blocks, and the
parameter names of a model of its depth. Its file says in its metadata what shape it has, so that
`model.checkpoint` can build it. Structured pruning as PATROL (arXiv 2307.10981) has it on the edge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from torch import Tensor, nn

from fedsplit.choose import fraction, ranked
from fedsplit.front.masks import KINDS, Masks, prunable
from fedsplit.rng import key
from fedsplit.types import FedsplitError

METADATA = "fedsplit"


@dataclass(frozen=True)
class Shape:
    """What is left of a model: of each block its number in the whole model, its heads and its MLP hidden units."""

    blocks: tuple[int, ...]
    heads: tuple[int, ...]
    mlp: tuple[int, ...]

    def metadata(self) -> dict[str, str]:
        """What a safetensors file says of it."""
        return {METADATA: json.dumps(asdict(self))}

    @staticmethod
    def read(text: str) -> Shape:
        """The shape that `metadata` wrote; raises ValueError where it is none."""
        try:
            found = Shape(**{name: tuple(map(int, row)) for name, row in json.loads(text).items()})
        except (TypeError, AttributeError) as error:
            raise ValueError(str(error)) from None
        if not len(found.blocks) == len(found.heads) == len(found.mlp) > 0:
            raise ValueError("rows of unequal length")
        return found


def settle(vit: nn.Module, masks: Masks, keep: Mapping[str, float], seed: int) -> None:
    """Zero the masks of what must go: all but fraction `keep` of each kind, and blocks that have nothing left.

    What goes first has the lowest score: the norm of the weights by which it writes into the residual stream,
    with its masks and LayerScale folded in, compared over all masked blocks. A fraction counts all structures that
    there were. A block that stays keeps its best head and its best hidden unit, unless their masks are 0 already.
    """
    with torch.no_grad():
        scores = {number: _scores(cast(Any, vit).blocks[number], *masks.of(number)) for number in masks.numbers}
        for kind in ("blocks", "heads", "mlp"):
            _keep_best(masks, {number: found[kind] for number, found in scores.items()}, kind, keep[kind], seed)
        for number in masks.numbers:
            heads, hidden, whole = masks.of(number)
            if not heads.any() and not hidden.any():
                whole.zero_()


def remove(vit: nn.Module, masks: Masks) -> Shape:
    """Take what is masked out of `vit`, in place, and fold the other masks into its weights; returns its shape.

    It computes what the masked model did: to rounding, and exactly where every mask is 1. A block whose heads
    (or hidden units) are all masked, but not itself, keeps one of them, which adds nothing.

    Raises:
        FedsplitError: no block would be left.
    """
    model: Any = vit
    dead = [number for number in masks.numbers if not masks.of(number)[2].any()]
    if len(dead) == len(model.blocks):
        raise FedsplitError("Pruning would take out every block of the model; lower harden.l1 or harden.mask-lr.")
    masks.off()
    before = shape_of(vit) or Shape(tuple(range(len(model.blocks))), (), ())
    with torch.no_grad():
        for number in sorted({*masks.numbers} - {*dead}):
            heads, hidden, whole = masks.of(number)
            block = model.blocks[number]
            _scale(block.attn.proj, heads.repeat_interleave(block.attn.head_dim) * whole, whole)
            _scale(block.mlp.fc2, hidden * whole, whole)
            _narrow(block, _left(heads), _left(hidden))
    numbers = [number for number in range(len(model.blocks)) if number not in dead]
    model.blocks = nn.Sequential(*(model.blocks[number] for number in numbers))
    return _note(model, tuple(before.blocks[number] for number in numbers))


def shape_as(vit: nn.Module, shape: Shape) -> None:
    """Give the whole model `vit` the shape of a pruned one, in place, for its weights to be loaded.

    Raises:
        FedsplitError: it has not that much to give.
    """
    model: Any = vit
    ascending = all(one < other for one, other in zip(shape.blocks, shape.blocks[1:], strict=False))
    if not ascending or shape.blocks[0] < 0 or shape.blocks[-1] >= len(model.blocks):
        raise FedsplitError(
            f"The file holds other blocks than this model's {len(model.blocks)}; set model.name to its."
        )
    for number, heads, hidden in zip(shape.blocks, shape.heads, shape.mlp, strict=True):
        block = prunable(model.blocks[number], number)
        most = _widths(block)
        if (heads, hidden) != most:
            if not (1 <= heads <= most[0] and 1 <= hidden <= most[1]):
                raise FedsplitError(f"The file holds another block {number} than this model's; set model.name to its.")
            _narrow(block, torch.arange(heads), torch.arange(hidden))
    model.blocks = nn.Sequential(*(model.blocks[number] for number in shape.blocks))
    _note(model, shape.blocks)


def shape_of(vit: nn.Module) -> Shape | None:
    """The shape of a model that was pruned; None for any other."""
    return getattr(vit, "pruned", None)


def read_shape(path: Path) -> Shape | None:
    """The shape that a checkpoint's metadata says; None where the file is missing or says none.

    Raises:
        FedsplitError: it says something that is no shape.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, "pt") as source:
            text = (source.metadata() or {}).get(METADATA)
    except (OSError, safetensors.SafetensorError):
        return None  # whoever reads its tensors says why
    try:
        return None if text is None else Shape.read(text)
    except ValueError:
        raise FedsplitError(
            f"{path} says a shape of the model that is none; make it anew with fedsplit harden."
        ) from None


def _scores(block: Any, heads: Tensor, hidden: Tensor, whole: Tensor) -> dict[str, Tensor]:
    """By kind, a score of every structure of a block on the CPU in float64."""
    found = {}
    parts = (("heads", block.attn.proj, block.ls1, heads), ("mlp", block.mlp.fc2, block.ls2, hidden))
    for kind, layer, scale, mask in parts:
        weight = layer.weight.double() * getattr(scale, "gamma", torch.ones(1, device=whole.device)).double()[:, None]
        norms = weight.unflatten(1, (len(mask), -1)).square().sum((0, 2)).sqrt()
        found[kind] = (norms * mask * whole).cpu()
    found["blocks"] = torch.stack([score.square().sum() for score in found.values()]).sum().sqrt()[None]
    return found


def _keep_best(masks: Masks, scores: Mapping[int, Tensor], kind: str, keep: float, seed: int) -> None:
    """Zero the masks of `kind` but those of the best structures, and of the best one of each block that stays."""
    alive = [number for number in masks.numbers if masks.of(number)[2].any()]
    total = sum(len(score) for score in scores.values())
    if keep == 1 or not alive:
        return
    places = [(number, at) for number in alive for at in range(len(scores[number]))]
    best = {(number, int(scores[number].argmax())) for number in alive} if kind != "blocks" else set()
    order = [places[at] for at in ranked(torch.cat([scores[number] for number in alive]), key(seed, kind)).tolist()]
    order.sort(key=lambda place: place not in best)  # stable: the best of each block come first
    for number, at in order[max(fraction(total, keep), len(best)) :]:
        masks.of(number)[KINDS.index(kind)][at] = 0


def _scale(layer: nn.Linear, columns: Tensor, whole: Tensor) -> None:
    layer.weight.mul_(columns)
    if layer.bias is not None:
        layer.bias.mul_(whole)


def _left(mask: Tensor) -> Tensor:
    """The positions that a mask leaves, one at least."""
    found = mask.nonzero().flatten()
    return found if len(found) else found.new_zeros(1)


def _narrow(block: Any, heads: Tensor, hidden: Tensor) -> None:
    """Leave only these heads and hidden units in a block."""
    attn, mlp = block.attn, block.mlp
    columns = (heads[:, None] * attn.head_dim + torch.arange(attn.head_dim, device=heads.device)).flatten()
    rows = torch.cat([group * attn.attn_dim + columns for group in range(3)])
    for layer, dim, index in ((attn.qkv, 0, rows), (attn.proj, 1, columns), (mlp.fc1, 0, hidden), (mlp.fc2, 1, hidden)):
        _take(layer, dim, index)
    attn.num_heads, attn.attn_dim = len(heads), len(columns)


def _take(layer: Any, dim: int, index: Tensor) -> None:
    def cut(parameter: nn.Parameter, dim: int) -> nn.Parameter:
        values = parameter.detach().index_select(dim, index.to(parameter.device))
        return nn.Parameter(values, requires_grad=parameter.requires_grad)

    layer.weight = cut(layer.weight, dim)
    if dim == 0 and layer.bias is not None:
        layer.bias = cut(layer.bias, 0)
    layer.out_features, layer.in_features = layer.weight.shape


def _widths(block: Any) -> tuple[int, int]:
    return int(block.attn.num_heads), int(block.mlp.fc1.out_features)


def _note(model: Any, blocks: Sequence[int]) -> Shape:
    widths = [_widths(block) for block in model.blocks]
    model.pruned = Shape(tuple(blocks), *(tuple(row) for row in zip(*widths, strict=True)))
    return cast(Shape, model.pruned)
