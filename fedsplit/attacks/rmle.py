"""White-box optimisation: an image whose activations are those that were seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit import rng
from fedsplit.attacks.base import Knowledge, Transcript
from fedsplit.attacks.patches import patch_side, weights
from fedsplit.attacks.work import Work, adam
from fedsplit.types import knob


@dataclass(frozen=True)
class RMLE:
    """Regularised maximum likelihood: descends, from the pixels, the distance of their activations to those seen.

    All images at once, each with a loss of its own: mean squared distance of activations that are standardised by
    channel, or one less the mean cosine of tokens, plus `tv` times the mean squared difference of neighbouring
    pixels in [0, 1], plus `patch` times the norms of the jumps across the patches' borders. Uploads are averaged.

    Paper: He, Zhang and Lee, ACSAC 2019, and its public code (squared differences, AMSGrad); cosine and
        patch prior as in DRAG's baseline (ICML 2025).
    Place: audit.attacks.
    Off: leave it out of the list.
    Deviates: activations are divided by their standard deviation per channel over the transcript, so a front
        gains nothing by scaling them, and weights of the priors are on that scale (the default is ours, chosen
        behind one and three blocks of `fedsplit_micro`); pixels are clamped to [0, 1] after each step; the start is
        grey, which is near the code's zeros of a normalised input; of several restarts each image keeps the closest.
    """

    needs: ClassVar[tuple[str, ...]] = ("front",)
    finds: ClassVar[str] = "images"

    steps: int = knob(2000, "steps of Adam; published are 5000 for a CNN, 20000 for a ViT", low=1)
    lr: float = knob(5e-2, "learning rate; published are 1e-2 for a CNN, 5e-2 for a ViT", above=0.0)
    eps: float = knob(1e-8, "Adam's epsilon; the public code's is 1e-3, on another scale of the loss", above=0.0)
    distance: str = knob("l2", "between activations", choices=("l2", "cosine"))
    tv: float = knob(3.0, "weight of the total variation; tune it at every cut", low=0.0)
    patch: float = knob(0.0, "weight of jumps across the borders of patches", low=0.0)
    start: str = knob("grey", "the first image", choices=("grey", "zeros", "random"))
    restarts: int = knob(1, "descents, all but the first from random images", low=1)

    def run(self, transcript: Transcript, knowledge: Knowledge, key: int, work: Work) -> Tensor:
        """Images (S, 3, height, width) in [0, 1].

        Raises:
            NotApplicable: a patch prior, and no square patch belongs to a token.
        """
        assert knowledge.front is not None
        away = self._away(knowledge.front, transcript.mean)
        side = patch_side(transcript) if self.patch else 0
        found, reached = [], []
        for number in range(self.restarts):
            x = self._first(transcript, number, rng.key(key, "rmle", number)).requires_grad_()
            what = "rmle" if self.restarts == 1 else f"rmle, start {number + 1} of {self.restarts}"
            self._descend(what, x, away, side, work)
            with torch.no_grad():
                reached.append(away(x))
            found.append(x.detach())
        closest = torch.stack(reached).argmin(0)
        return torch.stack(found)[closest, torch.arange(len(closest))]

    def _descend(self, what: str, x: Tensor, away: Callable[[Tensor], Tensor], side: int, work: Work) -> None:
        def loss(_: int) -> Tensor:
            return (away(x) + self._prior(x, side)).sum()

        def clamp() -> None:
            x.data.clamp_(0, 1)

        work.descend(what, {"x": x}, loss, self.steps, adam(self.lr, eps=self.eps), clamp)

    def _away(self, front: Callable[[Tensor], Tensor], seen: Tensor) -> Callable[[Tensor], Tensor]:
        """The distance of the activations of images (S, 3, height, width) to those `seen` (S, N, C), as (S,)."""
        weight = weights(seen).float()

        def squared(x: Tensor) -> Tensor:
            return ((front(x) - seen) * weight).square().mean((1, 2))

        def cosine(x: Tensor) -> Tensor:
            return 1 - torch.cosine_similarity(front(x) * weight, seen * weight, dim=2).mean(1)

        return cosine if self.distance == "cosine" else squared

    def _prior(self, x: Tensor, side: int) -> Tensor:
        """The weighted priors of images (S, 3, height, width), (S,)."""
        down, across = x.diff(dim=2), x.diff(dim=3)
        total = self.tv * (down.square().mean((1, 2, 3)) + across.square().mean((1, 2, 3)))
        if side:
            rows = torch.linalg.vector_norm(down[:, :, side - 1 :: side], dim=(1, 3)).sum(1)
            columns = torch.linalg.vector_norm(across[:, :, :, side - 1 :: side], dim=(1, 2)).sum(1)
            total = total + self.patch * (rows + columns)
        return total

    def _first(self, transcript: Transcript, number: int, key: int) -> Tensor:
        shape = (transcript.activations.shape[1], *transcript.shape)
        if self.start == "random" or number:
            x = torch.rand(shape, generator=rng.torch_rng(key))
        else:
            x = torch.full(shape, 0.5 if self.start == "grey" else 0.0)
        return x.to(transcript.activations.device)
