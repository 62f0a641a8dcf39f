"""Soft masks on the structures of a block: trainable scales that an L1 step drives to exact zeros.

Masked are the output of each attention head, each hidden unit of the MLP, and all that a block adds to the
residual stream. A mask lives beside the model, which keeps its parameters and their names: it scales what flows
through a block until `off` is called. Multiplying by a mask saves nothing; `fedsplit.front.prune` takes out what
it zeroed.

The soft mask and its proximal step are those of GAL (Lin et al., CVPR 2019), which the pruning of PATROL
(arXiv 2307.10981) matches in words. GAL accelerates the step (FISTA) and gives every structure the same weight; here
it is plain, and weights are by kind, see `Masks.step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fedsplit.types import FedsplitError, Tensors

KINDS = ("heads", "mlp", "blocks")


class Masks:
    """Masks on the blocks `numbers` of `vit`, all 1 at first, where they change nothing; those of `kinds` train.

    `values` holds them by name: `<block>.heads` (H,), `<block>.mlp` (hidden units,), `<block>.blocks` (1,).
    Their gradients come with those of the loss.

    Raises:
        FedsplitError: a block that cannot be pruned.
    """

    def __init__(self, vit: nn.Module, numbers: Sequence[int], kinds: Iterable[str] = KINDS) -> None:
        self.numbers = tuple(numbers)
        self.kinds = tuple(kinds)
        self.values: dict[str, nn.Parameter] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        for number in self.numbers:
            block = prunable(cast(Any, vit).blocks[number], number)
            weight = block.attn.proj.weight
            for kind, count in zip(KINDS, (block.attn.num_heads, block.mlp.fc2.in_features, 1), strict=True):
                ones = torch.ones(count, dtype=weight.dtype, device=weight.device)
                self.values[f"{number}.{kind}"] = nn.Parameter(ones, requires_grad=kind in self.kinds)
            self._hook(block, number)

    def of(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """The masks of a block: (H,), (hidden units,), (1,), as they are kept, without autograd."""
        heads, hidden, whole = (self.values[f"{number}.{kind}"].detach() for kind in KINDS)
        return heads, hidden, whole

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for mask in self.values.values():
            mask.grad = None

    @torch.no_grad()
    def step(self, lr: float, l1: float) -> None:
        """A proximal step on the loss plus the weighted L1 norm: down the gradient, soft threshold, clipped at 0.

        Of n structures of a kind in a block each weighs `l1` / n in the norm and steps at rate n `lr`, since its
        gradient is about 1 / n of that of their block: the threshold is then `lr` times `l1` for every mask.
        """
        for mask in (mask for mask in self.values.values() if mask.requires_grad):
            moved = mask if mask.grad is None else mask - lr * len(mask) * mask.grad
            # Soft threshold and clip at once: what is negative after the threshold would be clipped anyway.
            mask.copy_((moved - lr * l1).clamp(min=0))

    def norm(self) -> float:
        """The weighted L1 norm of the masks that train, whose `l1`-fold `step` goes down."""
        return float(sum(mask.detach().mean() for mask in self.values.values() if mask.requires_grad))

    def left(self) -> dict[str, int]:
        """By kind, how many structures are not masked out; a block that is takes its heads and hidden units along."""
        counts = dict.fromkeys(KINDS, 0)
        for number in self.numbers:
            heads, hidden, whole = self.of(number)
            for kind, mask in zip(KINDS, (heads * whole, hidden * whole, whole), strict=True):
                counts[kind] += int((mask != 0).sum())
        return counts

    def state(self) -> Tensors:
        """Copies of the masks by name, on the CPU."""
        return {name: mask.detach().to("cpu", copy=True) for name, mask in self.values.items()}

    @torch.no_grad()
    def load(self, state: Tensors) -> None:
        """Put back what `state` gave."""
        for name, value in state.items():
            self.values[name].copy_(value)

    def off(self) -> None:
        """Take the masks off the model: what flows through it is no longer scaled."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, block: Any, number: int) -> None:
        heads, hidden, whole = (self.values[f"{number}.{kind}"] for kind in KINDS)
        size = block.attn.head_dim
        into = (block.attn.proj, lambda: heads.repeat_interleave(size)), (block.mlp.fc2, lambda: hidden)
        self._hooks += [layer.register_forward_pre_hook(_into(mask)) for layer, mask in into]
        for scale in (block.ls1, block.ls2):  # LayerScale, or the identity in its place
            self._hooks.append(scale.register_forward_hook(lambda _module, _inputs, out: out * whole))


def prunable(block: nn.Module, number: int) -> Any:
    """`block`, if heads and hidden units can be masked and taken out.

    Raises:
        FedsplitError: it is not timm's plain block of plain attention and MLP.
    """
    attn, mlp = cast(Any, getattr(block, "attn", None)), cast(Any, getattr(block, "mlp", None))
    plain = type(block) is Block and type(attn) is Attention and type(mlp) is Mlp
    if plain and getattr(attn, "gate", None) is None and all(type(m.norm) is nn.Identity for m in (attn, mlp)):
        layers = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
        if all(type(layer) is nn.Linear for layer in layers) and not any(True for _ in mlp.act.parameters()):
            if not hasattr(attn, "attn_dim"):
                raise FedsplitError("Attention with fewer heads than its width holds needs timm 1.0.23 or newer.")
            return block
    raise FedsplitError(
        f"Block {number} cannot be pruned: that takes timm's plain Block, with Attention and Mlp of plain linear "
        "layers and no norm or gate over heads or hidden units; choose another model.name, or set every "
        "harden.keep-* to 1.0 and harden.l1 to 0."
    )


def _into(mask: Callable[[], Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda _module, inputs: (inputs[0] * mask(), *inputs[1:])
