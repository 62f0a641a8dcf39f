"""The cut: a timm ViT as front, body and tail that keep the whole model's parameter names.

A part is a view: it holds the very modules of the model it was cut from, under the same global
names (`blocks.3.attn.qkv.weight`), so parameters, gradients and plans have one address wherever
the cut lies, and moving the cut changes bytes and seconds, never results.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedsplit.rng import key
from fedsplit.types import Cut, Op

EMBEDDING = ("patch_embed", "cls_token", "reg_token", "dist_token", "pos_embed", "pos_drop", "patch_drop", "norm_pre")
HEAD = ("norm", "attn_pool", "fc_norm", "head_drop", "head", "head_dist")


class Part(nn.Module):
    """Blocks `numbers` of `vit`, with its embedding and its head where asked.

    Call it with images `(B, 3, height, width)` if it embeds, else tokens `(B, N, C)`; it returns
    tokens, or logits `(B, classes)` if it classifies.
    """

    def __init__(self, vit: nn.Module, numbers: Sequence[int], *, embeds: bool, classifies: bool) -> None:
        super().__init__()
        self.numbers = tuple(numbers)
        self.embeds = embeds
        self.classifies = classifies
        self._shell = _shell(vit, self.numbers, embeds, classifies)
        self.random = any(_is_random(module) for module in self._shell.modules())

    def forward(self, x: Tensor, noise: int | None = None, ops: Sequence[Op] | None = None) -> Tensor:
        """Run the part.

        Every address draws its dropout from its own stream, so the draws do not depend on where
        the model is cut or on which machine a block runs.

        Args:
            x: images or tokens, see the class.
            noise: this step's random stream; None leaves torch's own generator alone.
            ops: one `Op` per block of this part; None runs all of them in full.
        """
        if self.embeds:
            self._seed(noise, "embedding")
            vit = cast(Any, self._shell)
            x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))
            # What arrives over a wire is contiguous. Without a class token timm's tokens are not, at any
            # depth, and kernels round strided tensors differently: so all cuts start contiguous.
            x = x.contiguous()
        for place, number in enumerate(self.numbers):
            op = Op.FULL if ops is None else ops[place]
            if op is not Op.SKIP:
                self._seed(noise, number)
                x = run_block(cast(Any, self._shell).blocks[str(number)], x, op)
        if self.classifies:
            self._seed(noise, "head")
            vit = cast(Any, self._shell)
            x = vit.forward_head(vit.norm(x))
        return x

    def named(self) -> dict[str, nn.Parameter]:
        """The part's parameters by their global names, in the model's order."""
        return dict(self._shell.named_parameters())

    def _seed(self, noise: int | None, address: int | str) -> None:
        if noise is not None and self.random and self.training:
            torch.manual_seed(key(noise, address))


@dataclass(frozen=True)
class Parts:
    """The three parts of one model."""

    front: Part
    body: Part
    tail: Part

    def train(self, mode: bool = True) -> None:
        """Set training or evaluation mode of all three."""
        for part in (self.front, self.body, self.tail):
            part.train(mode)

    def __call__(self, x: Tensor, noise: int | None = None) -> Tensor:
        """Logits `(B, classes)` of images `(B, 3, height, width)`, with nothing on the wire."""
        logits: Tensor = self.tail(self.body(self.front(x, noise), noise), noise)
        return logits


def split(vit: nn.Module, cut: Cut) -> Parts:
    """Cut `vit` into front, body and tail; the parts share its parameters."""
    last = cut.depth - cut.tail
    return Parts(
        front=Part(vit, range(cut.front), embeds=True, classifies=False),
        body=Part(vit, cut.body, embeds=False, classifies=False),
        tail=Part(vit, range(last, cut.depth), embeds=False, classifies=True),
    )


def run_block(block: nn.Module, x: Tensor, op: Op) -> Tensor:
    """One block, `(B, N, C)` to `(B, N, C)`: FULL, or FORWARD with its branches cut off from autograd."""
    if op is Op.FULL:
        full: Tensor = block(x)
        return full
    with torch.no_grad():
        branch: Tensor = block(x) - x
    return x + branch


def _shell(vit: nn.Module, numbers: Sequence[int], embeds: bool, classifies: bool) -> nn.Module:
    """A shallow copy of `vit` that owns only what the part needs, so that timm's methods still work."""
    shell = copy.copy(vit)
    shell._parameters = dict(vit._parameters)
    shell._modules = dict(vit._modules)
    shell._buffers = dict(vit._buffers)
    blocks = cast(Sequence[nn.Module], vit.blocks)
    shell._modules["blocks"] = nn.ModuleDict({str(number): blocks[number] for number in numbers})
    for name in (() if embeds else EMBEDDING) + (() if classifies else HEAD):
        if name in shell._parameters:
            shell._parameters[name] = None
        elif name in shell._modules:
            shell._modules[name] = nn.Identity()
    return shell


def _is_random(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return bool(getattr(module, "drop_prob", 0)) or type(module).__name__ == "PatchDropout"
