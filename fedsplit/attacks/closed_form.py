"""Attack zero: a front that only embeds patches is an affine map, and is solved for its pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.attacks.base import Knowledge, Transcript
from fedsplit.attacks.patches import patch_side, to_images, weights
from fedsplit.attacks.work import Work
from fedsplit.types import knob

PROBES = 32
SAME = 1e-4
SPREAD = 0.25  # of pixels about grey


@dataclass(frozen=True)
class ClosedForm:
    """Least squares, patch by patch, on the front's map about a grey image.

    The map is probed: grey, then one image for each of the 3 p^2 input values of a patch, raised at every patch at
    once. For a bare patch embedding the map is affine and each patch's own, so the result is exact up to rounding
    where C >= 3 p^2 (else what of a patch the embedding keeps). Behind blocks, or a norm, this is its linearisation
    about grey under equal changes of all patches: an attack of first order, and weak there. Uploads are averaged,
    and damped by what noise they still show: how they differ, or lie beside all that the map can make.

    Paper: none; Tikhonov's damped least squares on a known linear map.
    Place: audit.attacks.
    Off: leave it out of the list.
    Deviates: nothing to deviate from.
    """

    needs: ClassVar[tuple[str, ...]] = ("front",)
    finds: ClassVar[str] = "images"

    ridge: float = knob(1e-5, "least damping, as a fraction of the map's largest singular value", low=0.0)
    step: float = knob(0.25, "how far a probe raises a value above grey", above=0.0, high=0.5)

    def run(self, transcript: Transcript, knowledge: Knowledge, key: int, work: Work) -> Tensor:
        """Images (S, 3, height, width) in [0, 1]; nothing is drawn, so `key` is of no account.

        Raises:
            NotApplicable: no square patch belongs to a token.
        """
        assert knowledge.front is not None
        side = patch_side(transcript)
        seen = transcript.mean[:, transcript.tokens :].double()
        weight = weights(seen)
        noise = (_noise(transcript) * weight.square()).mean()
        base, slope = self._probe(knowledge.front, transcript, side, work)
        slope *= weight.float()
        change = (seen - base) * weight
        shared = slope.mean(0, dtype=torch.float64)
        if (slope - shared.float()).abs().max() <= SAME * shared.abs().max():
            # One map at every place, as of a bare patch embedding; its mean has less of the rounding.
            values = self._solve(shared, change.flatten(0, 1), noise).view(*change.shape[:2], -1)
        else:
            places = enumerate(slope)
            values = torch.stack([self._solve(own.double(), change[:, place], noise) for place, own in places], 1)
        return to_images(0.5 + values, transcript.shape, side).clamp(0, 1).float()

    def _probe(
        self, front: Callable[[Tensor], Tensor], transcript: Transcript, side: int, work: Work
    ) -> tuple[Tensor, Tensor]:
        """The patch tokens of grey (N, C) and what each input value of a patch adds to them, (N, 3 p^2, C)."""
        _, height, width = transcript.shape
        grey = torch.full((1, *transcript.shape), 0.5, device=transcript.activations.device)
        count = 3 * side * side
        found = []
        with torch.no_grad():
            base = front(grey)[0, transcript.tokens :].double()
            for first in range(0, count, PROBES):
                pattern = torch.eye(count, device=grey.device)[first : first + PROBES].view(-1, 3, side, side)
                probes = grey + self.step * pattern.repeat(1, 1, height // side, width // side)
                found.append((front(probes)[:, transcript.tokens :].double() - base).div(self.step).float())
                work.heard("probing the front", min(first + PROBES, count), count)
        return base, torch.cat(found).transpose(0, 1)

    def _solve(self, slope: Tensor, change: Tensor, noise: Tensor) -> Tensor:
        """Input values (B, 3 p^2) less grey, of changes (B, C) that a map (3 p^2, C) made and noise blurred."""
        u, s, v = torch.linalg.svd(slope, full_matrices=False)
        along = change @ v.T
        if spare := change.shape[1] - len(s):  # what the map cannot have made is noise, or not linear
            noise = torch.maximum(noise, (change - along @ v).square().sum() / (len(change) * spare))
        damping = (self.ridge * s[0]).square() + noise / SPREAD**2
        values: Tensor = (along * torch.where(s > 0, s / (s.square() + damping), 0.0)) @ u.T
        return values


def _noise(transcript: Transcript) -> Tensor:
    """The variance by channel (C,) float64 that is left in the mean of uploads, by how much they differ."""
    uploads = transcript.activations[:, :, transcript.tokens :].double()
    count = len(uploads)
    return (uploads - uploads.mean(0)).square().mean((1, 2)).sum(0) / max(1, count * (count - 1))
