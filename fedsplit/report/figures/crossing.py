"""What the server receives of a few training images, drawn without any attack."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedsplit.report import style
from fedsplit.report.reading import Absent, Run
from fedsplit.types import FedsplitError

Floats = npt.NDArray[np.float64]


def crossing(run: Run, count: int = 6) -> style.Picture:
    """Images above what crosses the cut of them: patch tokens by their principal components, and by their size.

    The first three principal components of all tokens shown are red, green and blue, a pixel a patch; then the
    Euclidean norm of each token, and, where gradients go up that tell patches apart, theirs. The samples are those
    that an audit attacks; they go over the wire once more, through codecs and defences, with the run's weights.

    Raises:
        Absent: the run has not ended, or sends no activations.
    """
    from fedsplit import audit
    from fedsplit.audit.scene import scene
    from fedsplit.front.guard import patch_grid

    pairs = [f"audit.victims={count}", "audit.uploads=1", "audit.auxiliary=none"]
    try:
        target = audit.of_run(run.path, "quick", pairs)
        seen = scene(target.built)
    except FedsplitError as error:
        raise Absent(f"Its activations cannot be seen again. {error}".rstrip(".") + ".") from None
    grid, skip = patch_grid(target.built.backbone.vit), seen.transcript.tokens
    tokens = seen.transcript.last[:, skip:].double().numpy()
    rows: list[tuple[str, Floats]] = [("image, stays", seen.originals.permute(0, 2, 3, 1).double().numpy())]
    if tokens.shape[1] == grid[0] * grid[1]:
        rows += [("tokens up", _on(components(tokens), grid)), ("their size", _on(_size(tokens), grid))]
    else:  # one that is no grid of patches, such as pooled tokens
        rows += [("tokens up", components(tokens)[:, None])]
    gradients = seen.transcript.gradients
    if gradients is not None and gradients.shape[2] - skip == grid[0] * grid[1]:
        sizes = _size(gradients[-1][:, skip:].double().numpy())
        if np.ptp(sizes, axis=1).max() > 1e-6 * sizes.max():  # those of a mean of all patches are all the same
            rows.append(("gradients up", _on(sizes, grid)))
    return _grid_of(rows, run)


def components(tokens: Floats) -> Floats:
    """The first three principal components of tokens (S, N, C), each between 0 and 1, as (S, N, 3)."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    centred = flat - flat.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:3] * np.sign(axes[:3, np.abs(axes[:3]).argmax(axis=1)].diagonal())[:, None]
    values = centred @ axes.T
    low, high = np.percentile(values, (2, 98), axis=0)
    scaled = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)
    padded = np.zeros((len(flat), 3))
    padded[:, : scaled.shape[1]] = scaled
    return padded.reshape(*tokens.shape[:2], 3)


def _size(tokens: Floats) -> Floats:
    """The norm of tokens (S, N, C), as (S, N)."""
    norms: Floats = np.linalg.norm(tokens, axis=-1)
    return norms


def _on(values: Floats, grid: tuple[int, int]) -> Floats:
    """(S, N, ...) as (S, rows, columns, ...)."""
    return values.reshape(values.shape[0], *grid, *values.shape[2:])


def _grid_of(rows: list[tuple[str, Floats]], run: Run) -> style.Picture:
    count = len(rows[0][1])
    side = min(1.5, (style.WIDE - 1.1) / count)
    made = style.picture(1.1 + side * count, side * len(rows) + 0.2)
    places: Any = made.subplots(len(rows), count, squeeze=False)
    for line, (name, values) in enumerate(rows):
        for axes, value in zip(places[line], values, strict=True):
            axes.imshow(value, cmap=style.SCALE, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
        places[line][0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=style.NORMAL, color=style.INK)
    made.alt = f"{count} images of {run.name}, and below each: " + ", ".join(name for name, _ in rows[1:])
    return made
