"""What a hardening leaves for its users: the weights with their shape, and the card that says what they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fedsplit.front import prune
from fedsplit.front.models import load_weights
from fedsplit.harden import recipe
from fedsplit.harden.training import Training
from fedsplit.pretrain.checkpoint import write_bytes
from fedsplit.runs import provenance, write
from fedsplit.types import Scalar
from fedsplit.wire.frame import pack

WEIGHTS = "model.safetensors"
THREAT = (
    "PATROL (arXiv 2307.10981) protects inputs against a server that inverts the activations that it is sent. The "
    "attacker that a penalty trains is no measure of that, and small Lipschitz values may be features scaled down: "
    "attack this front with fresh decoders that know it and the defence, on normalised features, and compare with an "
    "unpruned front of equal FLOPs. Nothing is guaranteed, and the gradients of a front that trains on are not covered."
)
# Stages of the figures, their names on the card, and in words.
_STAGES = (
    ("before", "before", "before"),
    ("masked", "masked", "after the masks' training"),
    ("removed", "pruned", "after the removal"),
    ("after", "after", "at the end"),
)


def finish(training: Training) -> None:
    """Write the weights, load them back, and write the cards; `card.md` last, which makes the folder finished."""
    path = training.folder / WEIGHTS
    write_bytes(path, pack(training.state(), training.backbone.metadata))
    plain = training.plain(prune.read_shape(path))
    load_weights(plain.vit, path)
    found = card(training, path)
    write(training.folder / "card.json", json.dumps(found, indent=2) + "\n")
    write(training.folder / "card.md", as_text(found))


def card(training: Training, path: Path) -> dict[str, Any]:
    """The card as plain values."""
    config, figures = training.config, training.position.figures
    data = training.data
    shape = prune.shape_of(training.backbone.vit)
    return {
        "weights": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "model": config.model.name,
        "checkpoint": config.model.checkpoint,
        "image_size": training.backbone.image_size,
        "shape": json.loads(shape.metadata()[prune.METADATA]) if shape else None,
        "data": {
            "source": data.name,
            "images": len(training.indices),
            "test_images": len(data.test),
            "classes": len(data.classes),
        },
        "front": training.cut.front,
        "removed": _removed(training),
        **{name: figures[stage] for stage, name, _ in _STAGES if stage in figures},
        "chance": training.chance(),
        "epochs": {phase.name: phase.last - phase.first for phase in recipe.phases(config)},
        "penalties": {name: _settings(training, name) for name in training.penalties},
        "harden": {name: value for name, value in config.values.items() if name.startswith("harden.")},
        "threat_model": THREAT,
        "config": dict(recipe.deciding(config)),
        "made_with": provenance(config),
    }


def as_text(found: dict[str, Any]) -> str:
    """The card as Markdown."""
    data, removed = found["data"], found["removed"]
    rows = [f"| {word} | {_row(found[name])} |" for _, name, word in _STAGES if name in found]
    penalties = "; ".join(
        f"{name} ({', '.join(f'{k} = {v}' for k, v in settings.items())})"
        for name, settings in found["penalties"].items()
    )
    phases = ", ".join(f"{count} epochs of {name}" for name, count in found["epochs"].items() if count)
    widths = "; ".join(
        f"block {number}: {heads} heads, {hidden} MLP units"
        for number, (heads, hidden) in enumerate(zip(found["after"]["heads"], found["after"]["mlp"], strict=True))
    )
    return f"""# A hardened front of {found["model"]}

`{found["weights"]}`, sha256 `{found["sha256"]}`; use it with

    model.name = "{found["model"]}"
    model.checkpoint = "FOLDER/{found["weights"]}"
    cut.front = {found["front"]}

The front: {widths or "the embedding alone"}. Removed: {removed["blocks"]} blocks, {removed["heads"]} heads, \
{removed["mlp"]} MLP units (those of removed blocks included).

| | accuracy | parameters | of the front | FLOPs of an image | of the front |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Accuracy is that of the whole model on {data["test_images"]:,} test images; naming the commonest class every time has \
{100 * found["chance"]:.1f} %. FLOPs are those of the forward pass; a multiply and an add are two.

- Data: {data["source"]}, {data["images"]:,} training images, {data["classes"]} classes.
- Training: {phases or "none"}, seed {found["made_with"]["seed"]}.
- Penalties: {penalties or "none"}.
- Threat model: {found["threat_model"]}
- Again: `fedsplit harden --config config.toml --out NEW_FOLDER` with the `config.toml` beside this card.
"""


def _row(figures: dict[str, Any]) -> str:
    sizes = [figures.get(name) for name in ("parameters", "front_parameters", "flops", "front_flops")]
    return " | ".join([f"{100 * figures['accuracy']:.1f} %", *("" if size is None else f"{size:,}" for size in sizes)])


def _removed(training: Training) -> dict[str, int]:
    before, after = (training.position.figures[name] for name in ("before", "after"))
    widths = {kind: sum(before[kind]) - sum(after[kind]) for kind in ("heads", "mlp")}
    return {"blocks": before["front"] - after["front"], **widths}


def _settings(training: Training, name: str) -> dict[str, Scalar]:
    prefix = f"front.{name}."
    return {key.removeprefix(prefix): v for key, v in training.config.values.items() if key.startswith(prefix)}
