"""What a config makes of a model: where it is cut, who pools, what the tail reads, what is kept, on which device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedsplit.config import Config
from fedsplit.front import trainable
from fedsplit.front.vit import Part, Parts, Reads, Start, can_pool_early, opening
from fedsplit.types import Cut, FedsplitError


def address(config: Config, depth: int) -> Cut:
    """The cut of `config` in a model of `depth` blocks; without a split the front is all of it."""
    if config.cut.shape == "none":
        return Cut(depth, 0, depth)
    if config.cut.shape == "vanilla" and config.cut.tail:
        raise FedsplitError(
            "cut.tail gives blocks to the client, but cut.shape=vanilla has no tail there; set cut.tail=0."
        )
    cut = Cut(config.cut.front, config.cut.tail, depth)
    if not cut.body:
        raise FedsplitError(
            f"cut.front={cut.front} and cut.tail={cut.tail} leave the server none of {depth} blocks; "
            "lower them, or set cut.shape=none."
        )
    return cut


def pooling(config: Config, vit: nn.Module, cut: Cut) -> str:
    """Who pools the tokens, 'tail' or 'body', by `cut.pool`.

    Raises:
        FedsplitError: the body should, and the tail needs all tokens.
    """
    able = config.cut.shape != "none" and not cut.tail and can_pool_early(vit)
    if config.cut.pool == "body" and not able:
        raise FedsplitError(
            "cut.pool=body needs a split, cut.tail=0, and a model whose last norm does not need all tokens "
            "(class token, or average pooling before the norm); set cut.pool=tail."
        )
    return "tail" if config.cut.pool == "tail" or not able else "body"


def local_reads(config: Config, vit: Any, cut: Cut) -> Reads:
    """What the tail reads of the front's own tokens, by `local.head`.

    Without a phase that trains it an auxiliary head would guess, so there is none: 'auto' holds. A class
    token that has met no patch in any block of front or tail is the same for every image.
    """
    if has_local_head(config):
        return "local_head"
    if vit.global_pool != "token" or config.local.head == "tail":
        return "tokens"
    return "patches" if config.local.head == "patches" or not cut.front + cut.tail else "tokens"


def has_local_head(config: Config) -> bool:
    """Whether there is an auxiliary head: asked for, and trained by a phase of the client's own."""
    return config.local.head == "auxiliary" and any(phase.epochs for phase in config.pieces("local.phases"))


def kept_until(config: Config, front: Part, trains: trainable.TrainSet) -> Start:
    """How far a front output can be kept: to the cut, to what comes last and trains or draws anew, or not at all.

    Last come prompts, where only they train, and guards, which may draw at random for every upload.
    """
    if not config.front.cache or config.data.augment != "none" or config.front.penalties:
        return "images"
    if config.names("body.plans") and config.body.scope == "all" and front.numbers:
        return "images"
    if not trains.front and not front.random:
        return "cut"
    only_prompts = not trains.front or opening(front, trains.front) != slice(None)
    return "begun" if only_prompts and not front.random_before else "images"


def planned_blocks(config: Config, cut: Cut) -> tuple[int, ...]:
    """Global numbers of the blocks that `body.plans` may plan, by `body.scope`."""
    return tuple(cut.body if config.body.scope == "body" else range(cut.depth))


def by_side(config: Config, parts: Parts) -> tuple[dict[str, torch.nn.Parameter], dict[str, torch.nn.Parameter]]:
    """The trained parameters of the client and those of the server, by name."""
    front, body, tail = (
        {name: p for name, p in part.named().items() if p.requires_grad}
        for part in (parts.front, parts.body, parts.tail)
    )
    if config.cut.shape == "vanilla":
        return front, {**body, **tail}
    return {**front, **tail}, body


def pick_device(name: str) -> torch.device:
    """The torch device of key `device`.

    Raises:
        FedsplitError: CUDA is asked for and absent.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise FedsplitError("device=cuda, but torch sees no CUDA device here; set device=cpu or device=auto.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
