"""Labels, inferred from the gradients that come up to the body's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.attacks.base import Knowledge, NotApplicable, Transcript
from fedsplit.attacks.work import Work


@dataclass(frozen=True)
class Labels:
    """Gradient matching: the class whose gradient at the body's output looks most like the one that was seen.

    For every class the gradient of its cross entropy through the known tail, by autograd; compared by cosine, which
    neither the size of the batch nor a scaled loss changes, and averaged over uploads. In a vanilla split the
    labels were sent, and are given back.

    Paper: UnSplit, arXiv 2108.09033, its label inference.
    Place: audit.attacks.
    Off: leave it out of the list.
    Deviates: the tail is known, as it is at the server that merges it, and not a clone; cosine, not squared
        distance; the activations are those of the transcript, so nothing is optimised.
    """

    needs: ClassVar[tuple[str, ...]] = ("body", "tail")
    finds: ClassVar[str] = "labels"

    def run(self, transcript: Transcript, knowledge: Knowledge, key: int, work: Work) -> Tensor:
        """Labels (S,) int64; nothing is drawn, so `key` is of no account.

        Raises:
            NotApplicable: neither gradients nor labels crossed the cut.
        """
        if transcript.labels is not None:
            return transcript.labels
        if transcript.gradients is None:
            raise NotApplicable("label inference needs the gradients of the body's output, and none came up.")
        assert knowledge.body is not None and knowledge.tail is not None
        agreement = torch.zeros(())
        uploads = list(zip(transcript.activations, transcript.gradients, strict=True))
        for number, (activations, gradient) in enumerate(uploads):
            with torch.no_grad():
                output = knowledge.body(activations)
            agreement = agreement + _agreement(knowledge, output, gradient)
            work.heard("matching gradients", number + 1, len(uploads))
        return agreement.argmax(1)


def _agreement(knowledge: Knowledge, output: Tensor, seen: Tensor) -> Tensor:
    """The cosine of the gradient `seen` (S, M, C) with that of every class at the body's output, (S, classes)."""
    assert knowledge.tail is not None
    output = output.detach().requires_grad_()
    with torch.enable_grad():
        logits = knowledge.tail(output)
    share = logits.detach().softmax(1)
    found = []
    for label in range(logits.shape[1]):
        at_logits = share.clone()
        at_logits[:, label] -= 1
        (gradient,) = torch.autograd.grad(logits, output, at_logits, retain_graph=True)
        # A sure tail's gradient is tiny: no direction is lost in double precision.
        found.append(torch.cosine_similarity(gradient.flatten(1).double(), seen.flatten(1).double(), 1, eps=1e-60))
    return torch.stack(found, 1)
