"""What a config asks of a hardening: phases, learning rates, masks, and whether they go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedsplit.config import Config
from fedsplit.front.masks import KINDS
from fedsplit.types import Cut, FedsplitError, Scalar, split_names
from fedsplit.world import LOCAL_KEYS, LOCAL_SECTIONS


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs: `first` to before `last`, counted from 0, at learning rate `lr`."""

    name: str
    first: int
    last: int
    lr: float


def phases(config: Config) -> tuple[Phase, Phase]:
    """Before the removal and after it."""
    settings = config.harden
    lr = settings.lr or config.optimizer.lr
    last = settings.epochs + settings.finetune_epochs
    return (
        Phase("masks" if prunes(config) else "train", 0, settings.epochs, lr),
        Phase("finetune", settings.epochs, last, settings.finetune_lr or lr),
    )


def keep(config: Config) -> Mapping[str, float]:
    """By kind of structure the fraction that stays at most."""
    settings = config.harden
    return {"heads": settings.keep_heads, "mlp": settings.keep_mlp, "blocks": settings.keep_blocks}


def kinds(config: Config) -> tuple[str, ...]:
    """Structures whose masks train: those that the config names, and those of which a fraction must go."""
    named = split_names(config.harden.structures) if config.harden.l1 else ()
    return tuple(kind for kind in KINDS if kind in named or keep(config)[kind] < 1)


def prunes(config: Config) -> bool:
    """Whether anything may be removed."""
    return bool(config.cut.front or config.cut.shape == "none") and bool(kinds(config))


def check(config: Config, cut: Cut) -> None:
    """Refuse keys that do not go together, for a model cut at `cut`.

    Raises:
        FedsplitError: an unknown structure, a fraction to keep of no block, or nothing to do.
    """
    for name in split_names(config.harden.structures):
        if name not in KINDS:
            raise FedsplitError(f"harden.structures names no '{name}'; known: {', '.join(KINDS)}.")
    some = [f"harden.keep-{kind}={part:g}" for kind, part in keep(config).items() if part < 1]
    if some and not cut.front:
        raise FedsplitError(
            f"{some[0]} has nothing to prune: with cut.front=0 the front has no block; raise cut.front."
        )
    if not phases(config)[1].last and not some:
        raise FedsplitError(
            "harden.epochs=0, harden.finetune-epochs=0 and every harden.keep-* at 1.0 leave nothing to do; raise one."
        )


def deciding(config: Config) -> dict[str, Scalar]:
    """The keys that decide the outcome."""
    others = tuple(section for section in LOCAL_SECTIONS if section != "harden.")
    return {k: v for k, v in config.values.items() if k not in LOCAL_KEYS and not k.startswith(others)}
