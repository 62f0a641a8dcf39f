"""The picture of a partition. It draws on a canvas of its own and leaves pyplot's state alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

READABLE = 40


def draw(counts: npt.NDArray[np.int64], classes: Sequence[str], path: Path) -> None:
    """Draw `counts` (devices, classes) of samples to the image file `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    devices, total = counts.shape
    width = min(16.0, max(6.0, 3.0 + 0.3 * total))
    height = min(10.0, max(3.5, 1.5 + 0.28 * devices))
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid, bars = figure.subplots(1, 2, sharey=True, width_ratios=(5, 1))
    shown = np.ma.masked_equal(counts, 0)
    # LogNorm needs two distinct ends.
    norm = LogNorm(1, max(2, int(counts.max())))
    image = grid.imshow(shown, aspect="auto", cmap="cividis_r", norm=norm, interpolation="nearest")
    figure.colorbar(image, ax=grid, label="samples of the class", location="top", shrink=0.6, format="%g")
    grid.set_xlabel("class")
    grid.set_ylabel("device")
    if total <= READABLE:
        long = max(len(name) for name in classes) > 3
        grid.set_xticks(range(total), classes, rotation=60 if long else 0, ha="right" if long else "center")
    if devices <= READABLE:
        grid.set_yticks(range(devices))
    totals = counts.sum(axis=1)
    if devices <= READABLE:
        bars.barh(range(devices), totals, height=0.8, color="#31446b")
    else:  # one shape, since ten thousand take longer than a round
        bars.stairs(totals, np.arange(devices + 1) - 0.5, orientation="horizontal", fill=True, color="#31446b")
    bars.set_xlabel("samples")
    bars.tick_params(axis="x", rotation=60)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
