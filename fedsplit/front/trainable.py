"""What trains: the one list of parameter names that optimisers, sharing and the ledger read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedsplit.front.models import CLASSIFIER
from fedsplit.front.vit import Parts
from fedsplit.types import FedsplitError, split_names

WORDS = ("all", "front", "body", "tail", "head", "norms", "biases", "lora", "prompts")


@dataclass(frozen=True)
class TrainSet:
    """Names of the trained parameters, by part, each in the model's order."""

    front: tuple[str, ...]
    body: tuple[str, ...]
    tail: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return self.front + self.body + self.tail


def resolve(train: str, vit: nn.Module, parts: Parts) -> TrainSet:
    """The set that the words of key `train` name; sets `requires_grad` accordingly.

    Raises:
        FedsplitError: an unknown word, or one that names nothing in this model.
    """
    owners = {"front": parts.front.named(), "body": parts.body.named(), "tail": parts.tail.named()}
    norms = {
        f"{name}.{leaf}"
        for name, module in vit.named_modules()
        if "norm" in type(module).__name__.lower()
        for leaf, _ in module.named_parameters(recurse=False)
    }
    chosen: set[str] = set()
    words = split_names(train)
    if not words:
        raise FedsplitError(f"train is empty; name what trains: {', '.join(WORDS)}.")
    for word in words:
        if word not in WORDS:
            raise FedsplitError(f"train names no '{word}'; known words: {', '.join(WORDS)}.")
        found = {
            name
            for part, parameters in owners.items()
            for name in parameters
            if word in ("all", part)
            or (word == "head" and name.startswith((*CLASSIFIER, "local_head.")))
            or (word == "norms" and name in norms)
            or (word == "biases" and name.endswith(".bias"))
            or (word == "lora" and ".lora_" in name)
            or (word == "prompts" and "prompt" in name)
        }
        if not found:
            raise FedsplitError(f"train='{train}': '{word}' names no parameter of this model{_mend(word)}.")
        chosen |= found
    for parameters in owners.values():
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in chosen)
    return TrainSet(*(tuple(name for name in owners[part] if name in chosen) for part in ("front", "body", "tail")))


def _mend(word: str) -> str:
    mends = {
        "lora": "; set body.edits=lora",
        "prompts": "; set front.edits=prompts",
        "body": "; the body holds no block at this cut",
    }
    return mends.get(word, "")
