"""The cut: a timm ViT as front, body and tail that keep the whole model's parameter names.

A part is a view: it holds the very modules of the model it was cut from, under the same global
names (`blocks.3.attn.qkv.weight`), so parameters, gradients and plans have one address wherever
the cut lies, and moving the cut changes bytes and seconds, never results.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fedsplit.body.ops import execute, idle
from fedsplit.body.scores import contributions
from fedsplit.front.guard import Guard
from fedsplit.rng import key
from fedsplit.types import Cut, Plan, Tensors

EMBEDDING = ("patch_embed", "cls_token", "reg_token", "dist_token", "pos_embed", "pos_drop", "patch_drop", "norm_pre")
HEAD = ("norm", "attn_pool", "fc_norm", "head_drop", "head", "head_dist", "local_head")
Start = Literal["images", "begun", "cut"]
Reads = Literal["tokens", "pooled", "patches", "local_head"]


class Part(nn.Module):
    """Blocks `numbers` of `vit`, with its embedding and its head where asked.

    Call it with images `(B, 3, height, width)` if it embeds, else tokens `(B, N, C)`; it returns
    tokens, or logits `(B, classes)` if it classifies. `pools` ends it with what the classifier reads,
    `(B, 1 or 2, C)`; `reads` says what a part that classifies is given. One that embeds ends with the guards
    of `fedsplit.front.guard`, one that `opens` begins with what undoes them. `random` says whether training
    draws anything in it, `random_before` whether it does so before its last prompts and guards.
    """

    def __init__(
        self,
        vit: nn.Module,
        numbers: Sequence[int],
        *,
        embeds: bool = False,
        classifies: bool = False,
        pools: bool = False,
        reads: Reads = "tokens",
        opens: bool = False,
    ) -> None:
        super().__init__()
        self.numbers = tuple(numbers)
        self.embeds = embeds
        self.classifies = classifies
        self.pools = pools
        self.reads = reads
        self._shell = _shell(vit, self.numbers, embeds, classifies, opens)
        if reads == "pooled":
            cast(Any, self._shell).global_pool = "token"  # the one token there is
        self.random = any(_is_random(module) for module in self._shell.modules())
        last = (f"{self.last_prompt[0]}.", "guard.")
        self.random_before = any(
            _is_random(module) for name, module in self._shell.named_modules() if not name.startswith(last)
        )

    def forward(self, x: Tensor, noise: int | None = None, plan: Plan | None = None, start: Start = "images") -> Tensor:
        """Run the part.

        Every address draws its dropout from its own stream, so the draws do not depend on where
        the model is cut or on which machine a block runs.

        Args:
            x: images or tokens, see the class.
            noise: this step's random stream; None leaves torch's own generator alone.
            plan: what every block of the whole model does; None runs all of them in full.
            start: how far `x` has come already, in a part that embeds: "begun" is what `begin` gave,
                "cut" this part's output.
        """
        if start == "cut":
            return x
        if start == "images":
            x = self.begin(x, noise, plan)
        else:
            self._seed(noise, self.numbers[-1] if self.numbers else "embedding")
        prompt = self.last_prompt[1]
        x = x if prompt is None else prompt(x)
        for name, guard in _children(self._shell, "guard"):
            self._seed(noise, f"guard.{name}")
            x = guard(x)
        if self.pools:
            x = pooled(self._shell, x)
        if self.classifies:
            self._seed(noise, "head")
            x = self._classify(x)
        return x

    def begin(self, x: Tensor, noise: int | None = None, plan: Plan | None = None) -> Tensor:
        """Tokens (B, N, C) before this part's last prompts, guards, pooling and classifier."""
        for tokens in self.stages(x, noise, plan):
            x = tokens
        return x

    def stages(self, x: Tensor, noise: int | None = None, plan: Plan | None = None) -> Iterator[Tensor]:
        """Tokens (B, N, C) that this part's first block reads, then those after each of its blocks."""
        if self.embeds:
            x = self.embed(x, noise)
            x = _prompted(self._shell.norm_pre, "prompt", x) if self.numbers else x
        for _, undo in _children(self._shell, "unguard"):
            x = undo(x)
        yield x
        for number in self.numbers:
            self._seed(noise, number)
            x = run_block(self.block(number), x, plan, number)
            yield x

    def block(self, number: int) -> nn.Module:
        """The block of this global number."""
        return cast(nn.Module, cast(Any, self._shell).blocks[str(number)])

    def idle(self, plan: Plan) -> dict[str, tuple[int, Tensor]]:
        """What an optimiser must not move after `plan`: by parameter name, a dimension and positions along it."""
        return {
            f"blocks.{number}.{name}": place
            for number in self.numbers
            for name, place in idle(self.block(number), plan.ops[number]).items()
        }

    def contributions(self, metrics: Sequence[str], depth: int, units: int) -> Tensors:
        """By metric what each unit's weights and gradients say of it, (L, U) of the whole model, 0 elsewhere.

        A block of another number of units than U, which no plan can tell apart, has zeros.
        """
        scores = {metric: torch.zeros(depth, units) for metric in metrics}
        for number in self.numbers:
            found = contributions(self.block(number), whole=units == 1)
            for metric in metrics:
                if len(found[metric]) == units:
                    scores[metric][number] = found[metric]
        return scores

    @property
    def last_prompt(self) -> tuple[str, Any]:
        """Name and module of the prompts that this part puts in last; no module where there are none."""
        shell = cast(Any, self._shell)
        if self.numbers:
            last = self.numbers[-1]
            return f"blocks.{last}.prompt_after", getattr(shell.blocks[str(last)], "prompt_after", None)
        return "norm_pre.prompt", getattr(shell.norm_pre, "prompt", None)

    def embed(self, x: Tensor, noise: int | None = None) -> Tensor:
        """Tokens (B, N, C) of images (B, 3, height, width), before any prompt and block."""
        self._seed(noise, "embedding")
        vit = cast(Any, self._shell)
        norm = getattr(vit.norm_pre, "inner", vit.norm_pre)
        # What arrives over a wire is contiguous. Without a class token timm's tokens are not, at any
        # depth, and kernels round strided tensors differently: so all cuts start contiguous.
        tokens: Tensor = norm(vit.patch_drop(vit._pos_embed(vit.patch_embed(x)))).contiguous()
        return tokens

    def pixels(self, x: Tensor) -> Tensor:
        """Images (B, 3, height, width) between 0 and 1 of those that the part reads, whose channels are scaled."""
        mean, std = (x.new_tensor(figures).view(1, 3, 1, 1) for figures in cast(Any, self._shell).look)
        return x * std + mean

    def feature(self, x: Tensor) -> Tensor:
        """The mean patch token (B, C) of this part's output (B, N, C)."""
        return x[:, self.prefix :].mean(1)

    @property
    def prefix(self) -> int:
        """Tokens of this part's last output (or of what it classifies) before the patches, prompts included."""
        return int(cast(Any, self._shell).num_prefix_tokens)

    @prefix.setter
    def prefix(self, count: int) -> None:
        cast(Any, self._shell).num_prefix_tokens = count

    def named(self) -> dict[str, nn.Parameter]:
        """The part's parameters by their global names, in the model's order."""
        return dict(self._shell.named_parameters())

    def _classify(self, x: Tensor) -> Tensor:
        vit = cast(Any, self._shell)
        if self.reads == "local_head":
            return cast(Tensor, vit.local_head(self.feature(x)))
        x = vit.norm(x)
        if self.reads == "patches":  # in the place of the class token, and of the distillation token
            x = x[:, self.prefix :].mean(1, keepdim=True).expand(-1, 2, -1)
        return cast(Tensor, vit.forward_head(x))

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


def split(vit: nn.Module, cut: Cut, pool: str = "tail") -> Parts:
    """Cut `vit` into front, body and tail, which share its parameters; `pool` says who pools its tokens."""
    last = cut.depth - cut.tail
    at_body = pool == "body"
    parts = Parts(
        front=Part(vit, range(cut.front), embeds=True),
        body=Part(vit, cut.body, pools=at_body, opens=True),
        tail=Part(vit, range(last, cut.depth), classifies=True, reads="pooled" if at_body else "tokens"),
    )
    parts.front.prefix -= prompts_in(parts.body)
    return parts


def shortcut(vit: nn.Module, cut: Cut, parts: Parts, reads: Reads) -> Part:
    """The tail as it reads the front's own tokens, with the body left out; `reads` is one of its inputs."""
    last = cut.depth if reads == "local_head" else cut.depth - cut.tail
    short = Part(vit, range(last, cut.depth), classifies=True, reads=reads, opens=True)
    short.prefix = parts.front.prefix
    return short


def pooled(vit: Any, x: Tensor) -> Tensor:
    """What the classifier of `vit` reads of the last tokens (B, N, C): its class tokens, or their mean (B, 1, C)."""
    if vit.global_pool == "token":
        return x[:, : 2 if hasattr(vit, "head_dist") else 1]
    return cast(Tensor, vit.pool(x)).unsqueeze(1)


def can_pool_early(vit: Any) -> bool:
    """Whether pooling may come before the tail: nothing but the classifier, or a norm of each token, follows it."""
    if getattr(vit, "attn_pool", None) is not None:
        return False
    return vit.global_pool == "token" or isinstance(vit.norm, nn.Identity)


def prompts_in(part: Part) -> int:
    """Tokens that `part` puts in on the way."""
    return sum(getattr(module, "adds", 0) for module in part.modules())


def opening(front: Part, trained: Sequence[str]) -> slice:
    """The tokens of the front's output that need a gradient: the prompts, where only they train and come last."""
    name, prompt = front.last_prompt
    if prompt is None or not trained or not all(parameter.startswith(f"{name}.") for parameter in trained):
        return slice(None)
    return slice(prompt.prefix, prompt.prefix + prompt.adds)


def run_block(block: nn.Module, x: Tensor, plan: Plan | None, number: int) -> Tensor:
    """Block `number`, (B, N, C) to (B, N, C), by `plan`; prompts that sit before it go in whatever it does."""
    x = _prompted(block, "prompt_before", x)
    if plan is None:
        return execute(block, x, None)
    return execute(block, x, plan.row(number), plan.scale[number] if plan.scale else 1.0)


def _prompted(owner: Any, place: str, x: Tensor) -> Tensor:
    prompt = getattr(owner, place, None)
    return x if prompt is None else cast(Tensor, prompt(x))


def _children(owner: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    held = getattr(owner, name, None)
    return iter(()) if held is None else held.named_children()


def _shell(vit: nn.Module, numbers: Sequence[int], embeds: bool, classifies: bool, opens: bool) -> nn.Module:
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
    for name, keeps in (("guard", embeds), ("unguard", opens)):
        if not keeps:
            shell._modules.pop(name, None)
    return shell


def _is_random(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, Guard):
        return module.draws
    return bool(getattr(module, "drop_prob", 0)) or type(module).__name__ == "PatchDropout"
