"""Soft prompts: learnable tokens at the input, at the cut, or in every block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit import rng
from fedsplit.types import Cut, FedsplitError, knob


@dataclass(frozen=True)
class Prompts:
    """Learnable tokens after the prefix tokens, (B, N, C) to (B, N + count, C); `train = "prompts,..."` trains them.

    Paper: arXiv 2407.17533 (SFPrompt); VPT, arXiv 2203.12119, section 3.2: shallow (`at = "input"`) and `deep`.
    Place: front.edits.
    Off: count = 0.
    Deviates: at the input they have a fixed address, so results do not depend on the cut, and a client with
        blocks also runs their backward pass; at the cut it does not. Deep prompts train where their block
        runs, and tokens that the next block replaces still cross the wire. Pooling over patches skips prompts.
    """

    count: int = knob(5, "number of prompts; 0 is none", low=0)
    dropout: float = knob(0.0, "dropout of the prompts", low=0.0, high=0.99)
    init: str = knob(
        "vpt",
        "first values: vpt (uniform up to sqrt(6 / (3 p^2 + C))), normal (std 0.02), uniform (up to 0.1), zeros",
        choices=("vpt", "normal", "uniform", "zeros"),
    )
    at: str = knob("input", "where they go in: at the input of block 0, or at the cut", choices=("input", "cut"))
    side: str = knob("client", "whose they are at the cut: the client's or the server's", choices=("client", "server"))
    deep: bool = knob(False, "every later block has prompts of its own, in the place of those before it")

    def edit(self, vit: nn.Module, cut: Cut, key: int) -> nn.Module:
        """`vit` with prompts drawn from stream `key`.

        Raises:
            FedsplitError: a place that this cut does not have.
        """
        if not self.count:
            return vit
        self._check(cut)
        model: Any = vit
        first = self._tokens(model, key)
        if self.side == "server":
            _before(model.blocks[cut.front], first)
        elif self.at == "cut" and cut.front:
            _after(model.blocks[cut.front - 1], first)
        else:
            model.norm_pre = Prompted(model.norm_pre, first)
        for number in range(1, cut.depth) if self.deep else ():
            _before(model.blocks[number], self._tokens(model, rng.key(key, number), replaces=True))
        model.num_prefix_tokens += self.count  # timm's pooling over patches skips the prefix
        return vit

    def _tokens(self, model: Any, stream: int, replaces: bool = False) -> PromptTokens:
        shape, source = (1, self.count, model.embed_dim), rng.torch_rng(stream)
        if self.init == "normal":
            tokens = torch.randn(shape, generator=source) * 0.02
        elif self.init == "zeros":
            tokens = torch.zeros(shape)
        else:
            high, wide = model.patch_embed.patch_size
            bound = math.sqrt(6 / (3 * high * wide + model.embed_dim)) if self.init == "vpt" else 0.1
            tokens = (torch.rand(shape, generator=source) * 2 - 1) * bound
        return PromptTokens(tokens, model.num_prefix_tokens, self.dropout, replaces)

    def _check(self, cut: Cut) -> None:
        if self.deep and (self.at, self.side) != ("input", "client"):
            raise FedsplitError(
                "front.prompts.deep=true puts prompts into every block from the first on; "
                "set front.prompts.at=input and front.prompts.side=client."
            )
        if not cut.body and (self.at, self.side) != ("input", "client"):
            asked = "at=cut" if self.at == "cut" else "side=server"
            raise FedsplitError(
                f"front.prompts.{asked} needs blocks at the server, and cut.shape=none leaves it none; "
                "set front.prompts.at=input and front.prompts.side=client, or another cut.shape."
            )
        if self.at == "input" and self.side == "server" and cut.front:
            raise FedsplitError(
                f"front.prompts.side=server, but with cut.front={cut.front} the client holds the input of block 0; "
                "set front.prompts.at=cut, or cut.front=0."
            )


class PromptTokens(nn.Module):
    """Learnable tokens among the tokens: (B, N, C) to (B, N + count, C), or to (B, N, C) if they replace others."""

    def __init__(self, tokens: Tensor, prefix: int, dropout: float, replaces: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Parameter(tokens)
        self.prefix = prefix
        self.replaces = replaces
        self.drop = nn.Dropout(dropout)

    @property
    def adds(self) -> int:
        """How many tokens longer its output is."""
        return 0 if self.replaces else self.tokens.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """Tokens with the prompts after the first `prefix` of them."""
        prompts = self.drop(self.tokens.expand(len(x), -1, -1))
        after = self.prefix + self.tokens.shape[1] - self.adds
        return torch.cat([x[:, : self.prefix], prompts, x[:, after:]], dim=1)


class Prompted(nn.Module):
    """What stood before block 0, and then the prompts."""

    def __init__(self, inner: nn.Module, prompt: PromptTokens) -> None:
        super().__init__()
        self.inner = inner
        self.prompt = prompt

    def forward(self, x: Tensor) -> Tensor:
        """Tokens with the prompts among them."""
        tokens: Tensor = self.prompt(self.inner(x))
        return tokens


# `run_block` calls `prompt_before` and a part its last `prompt_after`, also at a skipped block: the number of tokens
# must not depend on a plan, and deep prompts of a skipped block are replaced by the next block before anything
# reads them. The hooks are for timm's own forward pass; they take the block as it comes, so that a deep copy uses
# its own prompts.


def _before(block: nn.Module, prompt: PromptTokens) -> None:
    block.prompt_before = prompt
    block.register_forward_pre_hook(_go_in)


def _after(block: nn.Module, prompt: PromptTokens) -> None:
    block.prompt_after = prompt
    block.register_forward_hook(_come_out)


def _go_in(block: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (block.prompt_before(inputs[0]), *inputs[1:])


def _come_out(block: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    tokens: Tensor = block.prompt_after(output)
    return tokens
