"""A linear decoder from a token to the pixels of its patch, fitted in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit import rng
from fedsplit.attacks.base import Knowledge, NotApplicable, Query, Transcript
from fedsplit.attacks.patches import inverse_scale, patch_side, to_images, to_patches
from fedsplit.attacks.work import Work
from fedsplit.types import knob

CHUNK = 32
HELD = 64
UNCHECKED = 1e-3
RIDGES = tuple(10.0**power for power in range(-8, 2))


@dataclass(frozen=True)
class Linear:
    """Ridge regression from standardised patch tokens to the pixels of their patches.

    One map serves every place, each with a mean of its own. It is fitted on the attacker's images as the server
    would see them, averaged over as many draws as the transcript has uploads that differ. With `ridge` = 0 the
    damping is the one with the least error on a fifth of those images, held out.

    Paper: none; ridge regression.
    Place: audit.attacks.
    Off: leave it out of the list.
    Deviates: nothing to deviate from.
    """

    needs: ClassVar[tuple[str, ...]] = ("query", "auxiliary")
    finds: ClassVar[str] = "images"

    ridge: float = knob(0.0, "weight of the squared map against the mean squared error; 0 is chosen", low=0.0)
    context: bool = knob(True, "also read the mean of all tokens")

    def run(self, transcript: Transcript, knowledge: Knowledge, key: int, work: Work) -> Tensor:
        """Images (S, 3, height, width) in [0, 1].

        Raises:
            NotApplicable: no square patch belongs to a token, or fewer than two images to fit on.
        """
        assert knowledge.query is not None and knowledge.auxiliary is not None
        images, side = knowledge.auxiliary, patch_side(transcript)
        if len(images) < 2:
            raise NotApplicable(f"a linear decoder cannot be fitted on {len(images)} images; grant it two or more.")
        # What a mean over uploads has lost of the noise, the tokens that the map is fitted on must have lost too.
        draws = len(transcript.activations) if (transcript.activations != transcript.activations[0]).any() else 1
        held = 0 if self.ridge else min(len(images) // 5, HELD)
        sums = _Sums()
        inputs, outputs = [], []
        for first in range(0, len(images), CHUNK):
            chunk = images[first : first + CHUNK]
            tokens = self._read(_seen(knowledge.query, chunk, draws, rng.key(key, "linear", first)), transcript)
            patches = to_patches(chunk, side).double()
            out = max(0, min(len(chunk), held - first))  # of the first images: they are held out
            inputs.append(tokens[:out])
            outputs.append(patches[:out])
            sums.add(tokens[out:], patches[out:])
            work.heard("fitting a linear map", first + len(chunk), len(images))
        maps = sums.maps((self.ridge,) if self.ridge else RIDGES if held else (UNCHECKED,))
        if held:
            tokens, patches = torch.cat(inputs), torch.cat(outputs)
            errors = torch.stack([(map_.patches(tokens) - patches).square().mean() for map_ in maps])
            maps = [maps[int(errors.argmin())]]
        found = maps[0].patches(self._read(transcript.mean, transcript))
        return to_images(found, transcript.shape, side).clamp(0, 1).float()

    def _read(self, activations: Tensor, transcript: Transcript) -> Tensor:
        """What the map reads, (B, patches, C or 2 C) float64, of activations (B, N, C)."""
        patches = activations[:, transcript.tokens :].double()
        if not self.context:
            return patches
        mean = activations.double().mean(1, keepdim=True)
        return torch.cat([patches, mean.expand_as(patches)], 2)


@dataclass(frozen=True)
class _Map:
    """Patches (B, N, P) are `outset` (N, P) plus what the map (F, P) makes of tokens less `centre` (N, F)."""

    centre: Tensor
    outset: Tensor
    map: Tensor

    def patches(self, tokens: Tensor) -> Tensor:
        return self.outset + (tokens - self.centre) @ self.map


class _Sums:
    """Sums over images of tokens (B, N, F), of patches (B, N, P), and of their products over all places."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: tuple[Tensor, ...] = (torch.zeros(()),) * 4

    def add(self, x: Tensor, y: Tensor) -> None:
        sums = x.sum(0), y.sum(0), torch.einsum("bnf,bng->fg", x, x), torch.einsum("bnf,bnp->fp", x, y)
        self.sums = tuple(old.to(new) + new for old, new in zip(self.sums, sums, strict=True))
        self.count += len(x)

    def maps(self, ridges: Sequence[float]) -> list[_Map]:
        """The map of least squares for each damping."""
        x, y, xx, xy = self.sums
        centre, outset, rows = x / self.count, y / self.count, self.count * len(x)
        gram = (xx - x.T @ centre) / rows
        scale = inverse_scale(gram.diagonal(), xx.diagonal() / rows)
        values, vectors = torch.linalg.eigh(gram * scale[:, None] * scale)
        turned = vectors.T @ ((xy - x.T @ outset) / rows * scale[:, None])
        return [
            _Map(centre, outset, scale[:, None] * (vectors @ (turned / (values.clamp(min=0) + ridge)[:, None])))
            for ridge in ridges
        ]


def _seen(query: Query, images: Tensor, draws: int, key: int) -> Tensor:
    """The mean over draws of what the server would see of images, (B, N, C)."""
    with torch.no_grad():
        return torch.stack([query(images, rng.key(key, draw)) for draw in range(draws)]).mean(0)
