"""An attacker in the training loop, whose failure is a term of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedsplit.attacks.decoders import decoder
from fedsplit.front.vit import Part
from fedsplit.types import FedsplitError, Tensors, knob


@dataclass(frozen=True)
class Adversary:
    """Trains a decoder of the activations beside the front, and has the front make its reconstructions bad.

    "hinge" adds beta max(0, SSIM - threshold), "capped" takes away beta min(MSE, error of the batch's mean image):
    beyond that image there is nothing left to hide, and an error without a bound would make training diverge.
    Images are compared between 0 and 1: the front knows the model's mean and standard deviation.

    Paper: arXiv 2205.04007 (ResSFL), the hinge; arXiv 2307.10981 (PATROL), L_adv.
    Place: front.penalties.
    Off: beta = 0.
    Deviates: the decoder lives for one client's round (in an offline phase for all of it) and starts anew in the
        next: warm-up is counted in steps of that time. It measures nothing: attack the final front with fresh,
        larger decoders. The accounts of FLOPs and memory leave it out.
    """

    beta: float = knob(0.3, "weight of the term; 0 is off", low=0.0)
    form: str = knob("hinge", "'hinge' on SSIM, or 'capped' squared error", choices=("hinge", "capped"))
    threshold: float = knob(0.5, "SSIM below which the hinge asks for no more", low=0.0, high=1.0)
    steps: int = knob(1, "steps of the decoder for one of the front", low=1)
    warmup: int = knob(20, "steps of the front in which a new decoder trains and the term is 0", low=0)
    reset: int = knob(0, "steps of the front after which a new decoder takes over; 0 is never", low=0)
    lr: float = knob(0.001, "learning rate of the decoder (Adam)", above=0.0)
    kind: str = knob("conv", "the decoder", choices=("conv", "transformer"))
    width: int = knob(64, "channels of the decoder, a multiple of 8", low=8)

    def __post_init__(self) -> None:
        if self.width % 8:
            raise FedsplitError(f"front.adversary.width={self.width} is no multiple of 8; give one, e.g. 64.")
        if self.reset and self.reset <= self.warmup:
            raise FedsplitError(
                f"front.adversary.reset={self.reset} ends every decoder within its warm-up of {self.warmup} steps, "
                "so that the term is always 0; raise reset, or lower warmup."
            )

    def penalty(self, front: Part, x: Tensor, h: Tensor, memory: Any, key: int) -> tuple[Tensor, Any]:
        """The term for images `x` (B, 3, height, width) and activations `h` (B, N, C); `memory` is the decoder.

        Its tensors: weights `weight|...` with Adam's moments `mean|...` and `square|...`, and `age`, the calls that
        it has seen. New weights are drawn from stream `key`.

        Raises:
            FedsplitError: patches that are no square grid, or torchmetrics is missing for the hinge.
        """
        if not self.beta or not h.requires_grad or h.is_meta:
            return h.new_zeros(()), memory
        target = front.pixels(x)
        with torch.device("meta"):
            net = self._decoder(front, x, h)
        if not memory or (self.reset and int(memory["age"]) >= self.reset):
            memory = _start(self._new(front, x, h, key))
        keep = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)  # past the client's meter
        with keep:
            memory = self._learn(net, h.detach(), target, memory)
            if int(memory["age"]) <= self.warmup:
                return h.new_zeros(()), memory
            term = self._term(_guess(net, _weights(memory), h), target)
        # A hinge that asks for nothing has gradients of zeros, and they would cost a backward pass of the decoder.
        return (self.beta * term if term else h.new_zeros(())), memory

    def _decoder(self, front: Part, x: Tensor, h: Tensor) -> nn.Module:
        shape = (int(x.shape[1]), int(x.shape[2]), int(x.shape[3]))
        return decoder(self.kind, (int(h.shape[1]), int(h.shape[2])), front.prefix, shape, self.width)

    def _new(self, front: Part, x: Tensor, h: Tensor, key: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(key)
            return self._decoder(front, x, h).to(h.device)

    def _learn(self, net: nn.Module, h: Tensor, target: Tensor, memory: Tensors) -> Tensors:
        """The memory after `steps` steps of Adam on the squared error."""
        leaves = {name: value.clone().requires_grad_() for name, value in _weights(memory).items()}
        optimizer = torch.optim.Adam(leaves.values(), lr=self.lr)
        if memory["age"]:
            for name, leaf in leaves.items():
                moments = (memory[f"mean|{name}"].clone(), memory[f"square|{name}"].clone())
                done = memory["age"].float() * self.steps
                optimizer.state[leaf] = dict(zip(("exp_avg", "exp_avg_sq", "step"), (*moments, done), strict=True))
        for _ in range(self.steps):
            error = (_guess(net, leaves, h) - target).square().mean()
            for leaf, gradient in zip(leaves.values(), torch.autograd.grad(error, list(leaves.values())), strict=True):
                leaf.grad = gradient
            optimizer.step()
        state = {name: optimizer.state[leaf] for name, leaf in leaves.items()}
        return (
            {f"weight|{name}": leaf.detach() for name, leaf in leaves.items()}
            | {f"mean|{name}": slots["exp_avg"] for name, slots in state.items()}
            | {f"square|{name}": slots["exp_avg_sq"] for name, slots in state.items()}
            | {"age": memory["age"] + 1}
        )

    def _term(self, guess: Tensor, target: Tensor) -> Tensor:
        if self.form == "capped":
            worst = (target - target.mean(0)).square().mean()
            return -torch.minimum((guess - target).square().mean(), worst)
        try:
            from torchmetrics.functional.image import structural_similarity_index_measure as ssim
        except ImportError:
            raise FedsplitError(
                "front.adversary.form=hinge needs torchmetrics: pip install 'fedsplit[audit]', or set form=capped."
            ) from None
        likeness: Any = ssim(guess, target, data_range=1.0)
        return torch.relu(likeness - self.threshold)


def _guess(net: nn.Module, weights: Tensors, h: Tensor) -> Tensor:
    """Images in [0, 1]: a decoder's output has no bounds, and is 0 at first, here grey."""
    guess: Tensor = torch.sigmoid(functional_call(net, weights, (h,)))
    return guess


def _start(net: nn.Module) -> Tensors:
    named = {f"weight|{name}": value.detach() for name, value in net.named_parameters()}
    return named | {"age": torch.zeros((), dtype=torch.int64)}


def _weights(memory: Tensors) -> Tensors:
    return {name.partition("|")[2]: value for name, value in memory.items() if name.startswith("weight|")}
