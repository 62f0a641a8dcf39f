"""Inversion of the mean of a sample's uploads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsplit.attacks.base import Knowledge, Transcript
from fedsplit.attacks.learned import Queried
from fedsplit.attacks.work import Work


@dataclass(frozen=True)
class Averaged(Queried):
    """The inverse network of an attacker that averages what it saw of a sample over rounds.

    A sample comes up in every round; noise that is drawn anew each time averages out. The network is that of
    `inverse-net`, trained on means of as many queries as there are uploads and applied to the means of the uploads.

    Paper: the inverse network of He, Zhang and Lee, ACSAC 2019; averaging over rounds is ours.
    Place: audit.attacks.
    Off: one upload of each sample, or a front that draws nothing, makes it `inverse-net`.
    Deviates: an upper bound, for the audit matches uploads to samples, which a real server must do itself; a front
        that moves over rounds is averaged all the same, and so are shuffled tokens that cannot be put in order.
    """

    needs: ClassVar[tuple[str, ...]] = ("query", "auxiliary")
    finds: ClassVar[str] = "images"

    def run(self, transcript: Transcript, knowledge: Knowledge, key: int, work: Work) -> Tensor:
        """Images (S, 3, height, width) of the mean of each sample's uploads."""
        return self.invert(transcript, transcript.activations, knowledge, key, work)
