"""An audit: every attack with every seed on one scene, each scored and kept as it ends."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from torch import Tensor

from fedsplit import rng
from fedsplit.attacks.base import NotApplicable, check
from fedsplit.attacks.work import Work
from fedsplit.audit.recognise import Recogniser
from fedsplit.audit.scene import Scene, scene
from fedsplit.config import Config
from fedsplit.metrics import privacy
from fedsplit.pretrain.checkpoint import write_bytes
from fedsplit.runs import sha256, sha256_text
from fedsplit.types import FedsplitError
from fedsplit.wire.frame import pack
from fedsplit.world import LOCAL_KEYS, World

MEAN_IMAGE = "mean-image"


class Watch(Protocol):
    """Who follows an audit."""

    def attack(self, name: str, seed: int, total: int) -> None:
        """An attack of `total` begins."""

    def step(self, what: str, done: int, total: int) -> None:
        """A step of it is done."""

    def note(self, text: str) -> None:
        """Something a reader should know."""


@dataclass(frozen=True)
class Result:
    """What one attack with one seed found, (S, 3, height, width) or labels (S,), and what it spent."""

    attack: str
    seed: int
    finds: str
    found: Tensor
    steps: int
    seconds: float


@dataclass(frozen=True)
class Findings:
    """An audit's results on `scene`: a row per attack and seed, a row per image, and what did not apply."""

    scene: Scene
    results: tuple[Result, ...]
    rows: tuple[dict[str, Any], ...]
    images: tuple[dict[str, Any], ...]
    skipped: Mapping[str, str]
    clean_identified: float
    baseline: dict[str, Any] = field(default_factory=dict)


def conduct(built: World, folder: Path, watch: Watch, strict: bool = False) -> Findings:
    """Attack the model in `built` by its section `audit`; results in `folder` that fit are taken as they are.

    With `strict` an attack that lacks what it needs is an error, else it is left out with a note.

    Raises:
        FedsplitError: no attack is named or none applies, or whatever is wrong with the scene.
    """
    config = built.config
    names = config.names("audit.attacks")
    if not names:
        raise FedsplitError("audit.attacks names no attack; name some, or choose a suite with --suite.")
    place = scene(built)
    marks = _marks(built, names)
    skipped: dict[str, str] = {}
    jobs = []
    for name, piece in zip(names, config.pieces("audit.attacks"), strict=True):
        try:
            check(piece, name, place.knowledge)
        except NotApplicable as reason:
            if strict:
                raise
            skipped[name] = str(reason)
            continue
        jobs += [(name, piece, seed) for seed in range(config.audit.seeds)]
    results: list[Result] = []
    for name, piece, seed in jobs:
        if name in skipped:
            continue
        watch.attack(name, seed, len(jobs))
        try:
            results.append(_attack(built, place, name, piece, seed, folder, marks[name], watch))
        except NotApplicable as reason:
            if strict:
                raise
            skipped[name] = str(reason)
    if not results:
        raise FedsplitError(f"No attack applies: {'; '.join(skipped.values())}")
    for name, why in skipped.items():
        watch.note(f"{name} is left out: {why}")
    return score(built, place, results, skipped)


def _attack(
    built: World, place: Scene, name: str, piece: Any, seed: int, folder: Path, mark: str, watch: Watch
) -> Result:
    file = folder / "attacks" / f"{name}-s{seed}.safetensors"
    if (kept := _kept(file, mark)) is not None:
        return Result(name, seed, piece.finds, *kept)
    file.parent.mkdir(parents=True, exist_ok=True)
    work = Work(file.parent / f".{name}-s{seed}-{mark[:12]}", watch.step)
    begun = time.perf_counter()
    found = piece.run(place.transcript, place.knowledge, built.key("audit", name, seed), work)
    found = found.detach().cpu()
    if piece.finds == "images":
        found = found.float().nan_to_num(0.5).clamp(0, 1)  # an attack that diverged has found nothing
    result = Result(name, seed, piece.finds, found, work.spent, time.perf_counter() - begun)
    about = {"mark": mark, "steps": str(result.steps), "seconds": f"{result.seconds:.3f}"}
    write_bytes(file, pack({"found": found}, about))
    work.clear()
    return result


def _kept(file: Path, mark: str) -> tuple[Tensor, int, float] | None:
    """What an earlier audit found with the same settings, if it did."""
    try:
        with safetensors.safe_open(file, framework="pt") as stored:
            about = stored.metadata() or {}
            if about.get("mark") != mark:
                return None
            return stored.get_tensor("found"), int(about["steps"]), float(about["seconds"])
    except (OSError, safetensors.SafetensorError, KeyError, ValueError):
        return None


def _marks(built: World, names: tuple[str, ...]) -> dict[str, str]:
    """What decides the result of each attack, as a digest: weights, config, and the attack's own keys."""
    values, weights = built.config.values, sha256(built.model_state())
    aside = (*LOCAL_KEYS, "audit.attacks", "audit.seeds")
    common = {k: v for k, v in values.items() if k not in aside and not k.startswith("engine.") and k.count(".") < 2}
    pieces = {k: v for k, v in values.items() if k.count(".") > 1 and not k.startswith("audit.")}
    marks = {}
    for name in names:
        own = {k: v for k, v in values.items() if k.startswith(f"audit.{name}.")}
        text = json.dumps([weights, common, pieces, own], sort_keys=True)
        marks[name] = sha256_text(text)
    return marks


def score(built: World, place: Scene, results: list[Result], skipped: Mapping[str, str]) -> Findings:
    """Results as rows, beside the mean image, which knows nothing of the transcript."""
    recogniser = Recogniser(built.data, place.ids, built.key("audit", "recogniser"))
    lpips = privacy.lpips()
    rows, images = [], []
    for result in (_mean_image(place), *results):
        if result.finds == "labels":
            right = (result.found == place.labels).float()
            rows.append(_row(result) | {"labels_right": float(right.mean())})
            continue
        per = {name: getattr(privacy, name)(result.found, place.originals) for name in ("mse", "psnr", "ssim")}
        if lpips is not None:
            per["lpips"] = lpips(result.found, place.originals)
        right = recogniser.right(result.found, place.labels)
        rows.append(_row(result) | _means(per, rng.key(built.config.seed, "audit", "interval")))
        rows[-1]["identified"] = float(right.float().mean())
        images += [
            {
                "attack": result.attack, "seed": result.seed, "sample": int(place.ids[at]),
                "label": int(place.labels[at]), **{name: float(values[at]) for name, values in per.items()},
                "identified": int(right[at]),
            }
            for at in range(len(place.ids))
        ]  # fmt: skip
    clean = float(recogniser.right(place.originals, place.labels).float().mean())
    return Findings(place, tuple(results), tuple(rows[1:]), tuple(images), dict(skipped), clean, rows[0])


def _mean_image(place: Scene) -> Result:
    """The mean of the attacker's images, or grey: what one may guess without seeing anything."""
    own = place.knowledge.auxiliary
    mean = torch.full(place.transcript.shape, 0.5) if own is None else own.mean(0)
    return Result(MEAN_IMAGE, 0, "images", mean.expand_as(place.originals).contiguous(), 0, 0.0)


def _row(result: Result) -> dict[str, Any]:
    return {
        "attack": result.attack,
        "seed": result.seed,
        "finds": result.finds,
        "steps": result.steps,
        "seconds": round(result.seconds, 2),
    }


def _means(per: Mapping[str, Tensor], key: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, values in per.items():
        found[name] = float(values.mean())
    low, high = privacy.interval(per["ssim"], key)
    most = per["ssim"]
    return found | {
        "ssim_ci_low": low,
        "ssim_ci_high": high,
        "ssim_p90": float(most.quantile(0.9)),
        "ssim_most": float(most.max()),
    }


def own_config(config: Config) -> dict[str, Any]:
    """The keys of section `audit` that were in force."""
    named = config.names("audit.attacks")
    return {
        key: value
        for key, value in config.values.items()
        if key.startswith("audit.") and (key.count(".") == 1 or key.split(".")[1] in named)
    }
