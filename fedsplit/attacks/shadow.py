"""Inversion without queries: of a front that the attacker trained in the place of the unknown one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsplit import rng
from fedsplit.attacks.base import Knowledge, Transcript
from fedsplit.attacks.decoders import drawn, grid_side
from fedsplit.attacks.encoders import Encoder, Moments
from fedsplit.attacks.learned import CHUNK, Fit, Scale
from fedsplit.attacks.work import Work, adam, cosine
from fedsplit.types import knob


@dataclass(frozen=True)
class Shadow(Fit):
    """A shadow front, trained so that the known rest of the model classifies its features; then a decoder of it.

    More `steps` and labelled auxiliary images spend more on it.

    Paper: He, Zhang and Lee, ACSAC 2019, query-free attack.
    Place: audit.attacks.
    Off: no such attack.
    Deviates: the shadow front also matches mean and covariance of the activations in the transcript, since a ViT's
        rest alone leaves it too free; it is inverted by the decoder of `inverse-net`, not by descent on the image,
        and that one learns from noisy features, since the shadow is not the front.
    """

    needs: ClassVar[tuple[str, ...]] = ("rest", "auxiliary", "labels")
    finds: ClassVar[str] = "images"

    steps: int = knob(200, "steps of the shadow front", low=1)
    shadow_lr: float = knob(0.001, "learning rate of the shadow front", above=0.0)
    noise: float = knob(1.0, "noise on the shadow features that the decoder learns from, in deviations", low=0.0)
    moments: float = knob(10.0, "weight of mean and covariance against the cross-entropy; 0 is off", low=0.0)

    def run(self, transcript: Transcript, knowledge: Knowledge, key: int, work: Work) -> Tensor:
        """Images (S, 3, height, width) of the last upload of each sample, as if the shadow front had sent it."""
        images = knowledge.auxiliary
        assert images is not None
        scale = Scale.level(transcript.activations.flatten(0, 1))
        front = self._front(transcript, scale, knowledge, key, work)
        with torch.no_grad():
            features = torch.cat([front(part) for part in images.split(CHUNK)])

        def pairs(draw: int) -> tuple[Tensor, Tensor]:
            noise = torch.randn(features.shape, generator=rng.torch_rng(rng.key(key, "noise", draw)))
            return images, features + self.noise * noise.to(features.device)

        invert = self.fit(pairs, min(10, self.epochs), transcript, rng.key(key, "inverse"), work)
        return invert(scale.apply(transcript.last))

    def _front(
        self, transcript: Transcript, scale: Scale, knowledge: Knowledge, key: int, work: Work
    ) -> Callable[[Tensor], Tensor]:
        """The shadow front: images (B, 3, height, width) to activations (B, N, C) standardised by `scale`."""
        rest, images, labels = knowledge.rest, knowledge.auxiliary, knowledge.labels
        assert rest is not None and images is not None and labels is not None
        seen = transcript.activations.flatten(0, 1)
        prefix, side = transcript.tokens, grid_side(seen.shape[1] - transcript.tokens, transcript.shape)
        channels, size = seen.shape[2], transcript.shape[1]
        front = drawn(lambda: Encoder(channels, prefix, side, size, self.width), rng.key(key, "shadow"), seen)
        match = Moments(scale.apply(seen))

        def loss(step: int) -> Tensor:
            among = torch.randint(len(images), (self.batch,), generator=rng.torch_rng(rng.key(key, "batch", step)))
            chosen = among.to(images.device)
            features = front(images[chosen])
            task = F.cross_entropy(rest(scale.undo(features)), labels[chosen])
            return task + self.moments * match(features)

        named = dict(front.named_parameters())
        work.descend("shadow front", named, loss, self.steps, adam(self.shadow_lr), rate=cosine(self.steps))
        return front
