"""Feature-space hijacking: a malicious server teaches the clients' front to be one that it can invert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsplit import rng
from fedsplit.attacks.base import Hijack, Knowledge, NotApplicable, Transcript
from fedsplit.attacks.decoders import decoder, drawn, grid_side
from fedsplit.attacks.encoders import Critic, Encoder
from fedsplit.attacks.learned import Scale, decode
from fedsplit.attacks.work import Work
from fedsplit.types import knob

PATIENCE = 10


@dataclass(frozen=True)
class Fsha:
    """Answers the clients' activations with the gradient that draws them into the feature space of a pilot.

    The pilot and its decoder are trained as an autoencoder of the attacker's images; a WGAN-GP critic tells its
    features from the clients', and what the clients then send, the decoder inverts. More `steps` spend more.

    Paper: arXiv 2012.02670, section 3; code `pasquini-dario/SplitNN_FSHA`.
    Place: audit.attacks.
    Off: no such attack.
    Deviates: rates, steps and penalty are for small fronts, not the paper's 1e-5, 1e-4, 10000 and 500; the critic
        takes several steps an answer; features are in units of the victims' first ones, and the decoder learns from
        noisy ones. It can't go on where it was interrupted, since the clients have learned in the meantime: it
        starts over. A frozen front that draws noise looks as if it moved, and costs all steps.
    """

    needs: ClassVar[tuple[str, ...]] = ("hijack", "auxiliary")
    finds: ClassVar[str] = "images"

    steps: int = knob(1000, "answers to the clients", low=1)
    lr: float = knob(0.001, "learning rate of Adam for pilot and decoder", above=0.0)
    critic_lr: float = knob(0.001, "learning rate of Adam for the critic", above=0.0)
    critic_steps: int = knob(4, "steps of the critic before every answer", low=1)
    penalty: float = knob(1.0, "weight of the critic's gradient penalty", low=0.0)
    noise: float = knob(0.5, "noise on the pilot's features that the decoder learns from, in deviations", low=0.0)
    batch: int = knob(32, "auxiliary images a step", low=1)
    width: int = knob(64, "channels of pilot, decoder and critic, a multiple of 32", low=32)

    def run(self, transcript: Transcript, knowledge: Knowledge, key: int, work: Work) -> Tensor:
        """Images (S, 3, height, width) of what the hijacked front makes of the samples under attack.

        Raises:
            NotApplicable: the front does not move, whatever it is answered.
        """
        hijack, images = knowledge.hijack, knowledge.auxiliary
        assert hijack is not None and images is not None
        before = hijack.victims()
        lesson = _Lesson(self, transcript, before, key)

        def act(step: int) -> None:
            among = torch.randint(len(images), (self.batch,), generator=rng.torch_rng(rng.key(key, "batch", step)))
            lesson.step(hijack, images[among.to(images.device)], rng.key(key, "mix", step))
            if step + 1 == min(PATIENCE, self.steps) and torch.equal(before, hijack.victims()):
                raise NotApplicable(
                    "fsha steers a front by the gradients that it is answered, and this one is frozen: it did not "
                    "move at all."
                )

        work.repeat("hijack", self.steps, act)
        return decode(lesson.decoder, lesson.scale.apply(hijack.victims()))


class _Lesson:
    """Pilot, decoder and critic with their optimisers; all of them see standardised activations."""

    def __init__(self, settings: Fsha, transcript: Transcript, like: Tensor, key: int) -> None:
        count, channels = like.shape[1:]
        prefix, shape, width = transcript.tokens, transcript.shape, settings.width
        side = grid_side(count - prefix, shape)
        self.scale, self.penalty, self.turns = Scale.level(like), settings.penalty, settings.critic_steps
        self.noise = settings.noise
        self.pilot = drawn(lambda: Encoder(channels, prefix, side, shape[1], width), rng.key(key, "pilot"), like)
        self.decoder = drawn(
            lambda: decoder("conv", (count, channels), prefix, shape, width), rng.key(key, "decoder"), like
        )
        self.critic = drawn(lambda: Critic(channels, prefix, side, width), rng.key(key, "critic"), like)
        both = [*self.pilot.parameters(), *self.decoder.parameters()]
        self.coder = torch.optim.Adam(both, lr=settings.lr)
        self.judge = torch.optim.Adam(self.critic.parameters(), lr=settings.critic_lr, betas=(0.5, 0.9))

    def step(self, hijack: Hijack, images: Tensor, key: int) -> None:
        """One batch of the clients and one of `images` (B, 3, height, width): every network takes a step."""
        upload = hijack.upload().detach()
        pilots = self.pilot(images)
        for turn in range(self.turns):
            self._criticise(self.scale.apply(upload), pilots.detach(), rng.key(key, turn))
        leaf = upload.clone().requires_grad_()
        score = self.critic(self.scale.apply(leaf)).mean()
        hijack.answer(torch.autograd.grad(-score, leaf)[0])
        self.coder.zero_grad()
        noise = torch.randn(pilots.shape, generator=rng.torch_rng(rng.key(key, "noise"))).to(pilots.device)
        F.mse_loss(self.decoder(pilots + self.noise * noise), images).backward()
        self.coder.step()

    def _criticise(self, clients: Tensor, pilots: Tensor, key: int) -> None:
        self.judge.zero_grad()
        count = min(len(clients), len(pilots))
        share = torch.rand(count, 1, 1, generator=rng.torch_rng(key)).to(clients.device)
        mixed = (share * clients[:count] + (1 - share) * pilots[:count]).requires_grad_()
        slope = torch.autograd.grad(self.critic(mixed).sum(), mixed, create_graph=True)[0].flatten(1).norm(dim=1)
        distance = self.critic(pilots).mean() - self.critic(clients).mean()
        (self.penalty * (slope - 1).square().mean() - distance).backward()
        self.judge.step()
