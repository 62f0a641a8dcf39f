"""Soft prompts at the input of the first block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.rng import torch_rng
from fedsplit.types import Cut, knob


@dataclass(frozen=True)
class Prompts:
    """Learnable tokens after the prefix tokens at the input of block 0; train them with `train = "prompts,..."`.

    Paper: arXiv 2407.17533 (SFPrompt); VPT-shallow, arXiv 2203.12119, eq. 4, which gives place and init.
    Place: front.edits.
    Off: count = 0.
    Deviates: a fixed address, so results do not depend on the cut: with blocks in the front the client
        also runs their backward pass. Pooling over patches leaves the prompts out.
    """

    count: int = knob(5, "number of prompts; 0 is none", low=0)
    dropout: float = knob(0.0, "dropout of the prompts", low=0.0, high=0.99)

    def edit(self, vit: nn.Module, cut: Cut, key: int) -> nn.Module:
        """`vit` with prompts from stream `key`: uniform in [-v, v], v^2 = 6 / (3 p^2 + C), patches p pixels wide."""
        if not self.count:
            return vit
        model: Any = vit
        high, wide = model.patch_embed.patch_size
        bound = math.sqrt(6 / (3 * high * wide + model.embed_dim))
        tokens = (torch.rand(1, self.count, model.embed_dim, generator=torch_rng(key)) * 2 - 1) * bound
        model.norm_pre = Prompted(model.norm_pre, tokens, model.num_prefix_tokens, self.dropout)
        model.num_prefix_tokens += self.count  # timm's pooling over patches skips the prefix
        return vit


class Prompted(nn.Module):
    """What stood before block 0, and then the prompts: (B, N, C) to (B, N + count, C)."""

    def __init__(self, inner: nn.Module, tokens: Tensor, prefix: int, dropout: float) -> None:
        super().__init__()
        self.inner = inner
        self.prompts = nn.Parameter(tokens)
        self.prefix = prefix
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens with the prompts after the first `prefix` of them."""
        x = self.inner(x)
        prompts = self.drop(self.prompts.expand(len(x), -1, -1))
        return torch.cat([x[:, : self.prefix], prompts, x[:, self.prefix :]], dim=1)
