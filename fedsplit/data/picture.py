"""The picture of a partition. It draws on a canvas of its own and leaves pyplot's state alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # matplotlib is for those who draw
    from fedsplit.report.style import Picture

READABLE = 40


def draw(counts: npt.NDArray[np.int64], classes: Sequence[str], path: Path) -> None:
    """Draw `counts` (devices, classes) of samples to the image file `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure(counts, classes).save(path)


def figure(counts: npt.NDArray[np.int64], classes: Sequence[str]) -> Picture:
    """The picture of `counts` (devices, classes) of samples, white where there is none."""
    from matplotlib.colors import LogNorm

    from fedsplit.report import style

    devices, total = counts.shape
    made = style.picture(style.WIDE, min(10.0, max(3.5, 1.5 + 0.28 * devices)))
    grid, bars = made.subplots(1, 2, sharey=True, width_ratios=(5, 1))
    shown = np.ma.masked_equal(counts, 0)
    # LogNorm needs two distinct ends.
    norm = LogNorm(1, max(2, int(counts.max())))
    image = grid.imshow(shown, aspect="auto", cmap=f"{style.SCALE}_r", norm=norm, interpolation="nearest")
    marks = [mark * 10**power for power in range(7) for mark in (1, 2, 5) if mark * 10**power <= norm.vmax]
    marks = marks if len(marks) < 8 else marks[::3]
    scale = made.colorbar(image, ax=grid, location="top", shrink=0.6, format="%g", ticks=marks)
    scale.ax.minorticks_off()
    scale.ax.tick_params(labelsize=style.SMALL)
    scale.set_label("samples of the class", fontsize=style.NORMAL, color=style.INK)
    style.dress(grid, x="class", y="device", grid="")
    style.dress(bars, x="samples", grid="x")
    if total <= READABLE:
        long = max(len(name) for name in classes) > 3
        grid.set_xticks(range(total), classes, rotation=60 if long else 0, ha="right" if long else "center")
    if devices <= READABLE:
        grid.set_yticks(range(devices))
    style.bars(bars, counts.sum(axis=1), style.tint(style.COLOURS[0], 0.75), READABLE)
    bars.tick_params(axis="x", rotation=60)
    return made
