"""Inversion by a network that learned it from queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsplit.attacks.base import Knowledge, Transcript
from fedsplit.attacks.learned import Queried
from fedsplit.attacks.work import Work


@dataclass(frozen=True)
class InverseNet(Queried):
    """A network from activations to images, trained on the attacker's own images and what the front makes of them.

    The front is a black box that answers queries. Shuffled tokens are put in order where its weights are known, too,
    and tell the places; else `decoder` "slots" reads them in no order. More `epochs`, `width` and auxiliary images
    spend more on it.

    Paper: He, Zhang and Lee, ACSAC 2019, black-box inverse network; for a ViT the "detokenizer" of DRAG's
        baselines (ICML 2025).
    Place: audit.attacks.
    Off: no such attack.
    Deviates: features are standardised by the queries, so that a front's scale defends nothing; the network learns
        what a linear map, fitted by least squares, leaves; its learning rate falls as a cosine.
    """

    needs: ClassVar[tuple[str, ...]] = ("query", "auxiliary")
    finds: ClassVar[str] = "images"

    def run(self, transcript: Transcript, knowledge: Knowledge, key: int, work: Work) -> Tensor:
        """Images (S, 3, height, width) of the last upload of each sample."""
        return self.invert(transcript, transcript.activations[-1:], knowledge, key, work)
