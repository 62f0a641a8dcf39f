"""The look of every plot: colours that colour-blind eyes tell apart, units on the axes, sizes that can be read.

A `Picture` is matplotlib's figure without pyplot: no global state, drawn by notebooks as it is, and told apart by
nothing but its content, so that the same tables give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito (2008), without the yellow that white paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SCALE = "cividis"
INK, MUTED, FAINT = "#1f2933", "#66707a", "#d9dee3"
SMALL, NORMAL, LARGE = 9, 10, 11.5
WIDE, HALF = 10.0, 4.9
PAGE_DPI, FILE_DPI = 144, 150
MEGA, GIGA = 1e6, 1e9


class Picture(Figure):
    """A figure that a notebook shows; `alt` says in words what it shows, `note` what it leaves out."""

    alt: str = ""
    note: str = ""

    def _repr_png_(self) -> bytes:
        return self.png(PAGE_DPI)

    def png(self, dpi: int = PAGE_DPI) -> bytes:
        """The picture as a PNG file, the same bytes for the same picture."""
        buffer = io.BytesIO()
        self.canvas.print_figure(buffer, dpi=dpi, format="png", facecolor="white", metadata={"Software": None})
        return buffer.getvalue()

    def save(self, path: Path) -> None:
        """Write the picture to a PNG file."""
        self.savefig(path, dpi=FILE_DPI, metadata={"Software": None})


def picture(width: float = WIDE, height: float = 3.6) -> Picture:
    """An empty picture, `width` and `height` in inches at 96 pixels each on the page."""
    made = Picture(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(made)
    return made


def dress(axes: Any, title: str = "", x: str = "", y: str = "", grid: str = "both", whole: str = "") -> Any:
    """Labels, a light grid along `grid` ("x", "y", "both", ""), whole numbers along the axes in `whole`."""
    axes.set_xlabel(x, fontsize=NORMAL, color=INK)
    axes.set_ylabel(y, fontsize=NORMAL, color=INK)
    if title:
        axes.set_title(title, fontsize=LARGE, loc="left", color=INK, pad=8)
    axes.tick_params(labelsize=SMALL, color=FAINT, labelcolor=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#aab2ba")
    if grid:
        axes.grid(axis=grid, color=FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
    for name in whole:
        getattr(axes, f"{name}axis").get_major_locator().set_params(integer=True)
    return axes


def legend(where: Any, columns: int = 1, **how: Any) -> Any:
    """A legend without a frame, in small letters."""
    return where.legend(**{"frameon": False, "fontsize": SMALL, "ncols": columns, "labelcolor": INK, **how})


def look(number: int) -> dict[str, Any]:
    """Colour, dash and marker of the `number`-th line."""
    turn = number // len(COLOURS)
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[turn % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.8,
    }


def tint(colour: str, share: float) -> tuple[float, float, float]:
    """`colour` mixed with white: 1 is the colour, 0 is white."""
    from matplotlib.colors import to_rgb

    red, green, blue = (1 - share * (1 - part) for part in to_rgb(colour))
    return red, green, blue


def heat(axes: Any, values: npt.NDArray[Any], label: str, low: float = 0.0, high: float = 1.0) -> Any:
    """`values` (rows, columns) as a heat map with a scale; what is no number stays grey."""
    axes.set_facecolor("#e9ecef")
    shown = np.ma.masked_invalid(values)
    image = axes.imshow(shown, aspect="auto", cmap=SCALE, vmin=low, vmax=high, interpolation="nearest")
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(label, fontsize=NORMAL, color=INK)
    bar.ax.tick_params(labelsize=SMALL, color=FAINT, labelcolor=INK)
    bar.outline.set_visible(False)
    return image


def bars(axes: Any, values: npt.NDArray[Any], colour: Any, most: int = 60) -> None:
    """Horizontal bars at 0, 1, ...; of more than `most` one shape, since ten thousand bars take longer than a round."""
    if len(values) <= most:
        axes.barh(range(len(values)), values, height=0.8, color=colour)
    else:
        axes.stairs(values, np.arange(len(values) + 1) - 0.5, orientation="horizontal", fill=True, color=colour)


def ticks(axes: Any, names: Sequence[object], which: str = "x", most: int = 24) -> None:
    """Name the cells of a heat map; of more than `most` every so many."""
    step = max(1, -(-len(names) // most))
    places = list(range(0, len(names), step))
    labels = [_short(str(names[place])) for place in places]
    turned = which == "x" and max((len(label) for label in labels), default=0) > 4
    how = {"rotation": 50, "ha": "right", "rotation_mode": "anchor"} if turned else {}
    getattr(axes, f"set_{which}ticks")(places, labels, **how)


def _short(text: str, most: int = 18) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
