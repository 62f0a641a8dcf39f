"""`fedsplit map`: the data path with the pieces that a config puts on it."""

from __future__ import annotations

from fedsplit.config import Config
from fedsplit.places import PLACES

WIDTH = 50


def draw(config: Config) -> str:
    """The picture of the split, and below it every place with its active pieces."""
    return "\n".join([*_split(config), "", *_places(config)])


def _split(config: Config) -> list[str]:
    cut, shape = config.cut, config.cut.shape
    if shape == "none":
        return [_row("client", "server"), _row("data ─► whole model, loss", ""), *_shared(config)]
    rows = [_row("client", f"server ({config.server.schedule})")]
    up, down = (f"──{name}──►" for name in ("activations", "gradients"))
    codecs = {
        way: config.names(f"wire.{way}")
        for way in ("activations-up", "activations-down", "gradients-up", "gradients-down")
    }
    if phases := config.names("local.phases"):
        rows.append(_row(f"data ─► front ─► tail, loss: {', '.join(phases)}", "(alone first)"))
    chosen = ", ".join(config.names("data.select"))
    front = f"data{f' [{chosen}]' if chosen else ''} ─► front ({cut.front} blocks)"
    plans = ", ".join(config.names("body.plans"))
    body = f"body [{plans}]" if plans else "body"
    rows.append(_row(f"{front} {up}", f"{body}{_with(codecs['activations-up'])}"))
    if shape == "vanilla":
        rows.append(_row("labels ──►", "tail, loss"))
        rows.append(_row("front ◄──gradients──", f"body{_with(codecs['gradients-down'])}"))
        return rows + _shared(config)
    pool = ", pools" if cut.pool == "body" or (cut.pool == "auto" and not cut.tail) else ""
    rows.append(_row(f"tail ({cut.tail} blocks) ◄──activations──", f"body{pool}{_with(codecs['activations-down'])}"))
    rows.append(_row("loss", ""))
    rows.append(_row(f"tail {down}", f"body{_with(codecs['gradients-up'])}"))
    rows.append(_row("front ◄──gradients──", f"body{_with(codecs['gradients-down'])}"))
    return rows + _shared(config)


def _shared(config: Config) -> list[str]:
    up, down = (config.names(f"wire.parameters-{way}") for way in ("up", "down"))
    return [
        _row("trained client parts ──update──►", f"share: {config.share.merge}{_with(up)}"),
        _row("                    ◄──model──", f"share{_with(down)}"),
    ]


def _places(config: Config) -> list[str]:
    lines = [
        f"trains: {config.train}    data: {config.data.source}, {config.data.partition}    model: {config.model.name}"
    ]
    for place in PLACES:
        active = config.names(place.key)
        keys = [
            f"{name}={config.values[name]}"
            for piece in active
            for name in config.values
            if name.startswith(f"{place.prefix}.{piece}.")
        ]
        known = ", ".join(place.pieces) or "none yet"
        lines.append(f"  {place.key:<24} {', '.join(active) or '(off)':<16} {' '.join(keys) or f'known: {known}'}")
    return lines


def _row(left: str, right: str) -> str:
    return f"{left:<{WIDTH}}|  {right}"


def _with(names: tuple[str, ...]) -> str:
    return f"  [wire: {' -> '.join(names)}]" if names else ""
