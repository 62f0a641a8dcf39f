"""Narrow activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.front.guard import Guard, put
from fedsplit.rng import torch_rng
from fedsplit.types import Cut, FedsplitError, knob


@dataclass(frozen=True)
class Bottleneck:
    """Sends tokens of `rank` channels, (B, N, rank): coordinates in an orthonormal basis, which the server maps back.

    The basis is drawn at random and known to both sides; it trains where `train` names the front (the client's
    half, `guard.bottleneck.basis`) or the body (the server's, `unguard.bottleneck.basis`). A frozen server's half
    is also the client's, who needs it to read its own tokens alone (`local.phases`, `data.select`).

    Paper: none for a random basis; a trained convolutional bottleneck is a part of ResSFL, arXiv 2205.04007.
    Place: front.edits.
    Off: rank = 0.
    Deviates: linear, on each token by itself, and without an activation function. All that is sent and received
        at the cut shrinks to rank / C of its bytes.
    """

    rank: int = knob(32, "channels that cross the wire; 0 is off", low=0)

    def edit(self, vit: nn.Module, cut: Cut, key: int) -> nn.Module:
        """`vit` with both halves, drawn from stream `key`.

        Raises:
            FedsplitError: nothing crosses this cut, or the rank exceeds the model's channels.
        """
        if not self.rank:
            return vit
        model: Any = vit
        if self.rank > model.embed_dim:
            raise FedsplitError(
                f"front.bottleneck.rank={self.rank} is more than the {model.embed_dim} channels of a token; "
                f"give at most {model.embed_dim}, or 0 for no bottleneck."
            )
        drawn = torch.randn(model.embed_dim, self.rank, generator=torch_rng(key))
        basis: Tensor = torch.linalg.qr(drawn).Q.contiguous()
        return put(vit, cut, "bottleneck", Down(basis), Up(basis.T.contiguous()))


class Down(Guard):
    """Tokens (B, N, C) to their coordinates (B, N, rank)."""

    def __init__(self, basis: Tensor) -> None:
        super().__init__()
        self.basis = nn.Parameter(basis)

    def act(self, x: Tensor) -> Tensor:
        """`x` (B, N, C) times the basis (C, rank)."""
        return x @ self.basis


class Up(nn.Module):
    """Coordinates (B, N, rank) back to tokens (B, N, C)."""

    def __init__(self, basis: Tensor) -> None:
        super().__init__()
        self.basis = nn.Parameter(basis)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (B, N, rank) times the basis (rank, C)."""
        return x @ self.basis
