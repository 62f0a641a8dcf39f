"""What attackers made of a run's activations: scores by attack, and the reconstructions themselves."""

from __future__ import annotations

from typing import Any

from fedsplit.report import style
from fedsplit.report.reading import Absent, Run

ACROSS = 6.5  # inches of the grid: its images are small
NOT_AUDITED = "The run was not audited: fedsplit audit RUN writes RUN/audit."


def audit(run: Run) -> style.Picture:
    """SSIM of every attack's reconstructions, with its 95 % confidence interval; low is safer.

    The dashed line, at 0.3, is the usual bound below which images are not recognised (He, Zhang and Lee, ACSAC 2019).

    Raises:
        Absent: no audit of images.
    """
    rows = [row for row in run.audit.get("attacks", []) if "ssim" in row]
    if not rows:
        raise Absent(NOT_AUDITED if not run.audit else "Its audit reconstructs no images.")
    rows.sort(key=lambda row: row["ssim"])
    made = style.picture(style.WIDE, 1.5 + 0.36 * len(rows))
    axes: Any = made.subplots()
    at = range(len(rows))
    means = [row["ssim"] for row in rows]
    spans = [[abs(row["ssim"] - row.get(f"ssim_ci_{end}", row["ssim"])) for row in rows] for end in ("low", "high")]
    axes.barh(at, means, height=0.62, color=style.tint(style.COLOURS[0], 0.75), xerr=spans, ecolor=style.INK, capsize=3)
    guess = run.audit.get("mean_image", {}).get("ssim")
    if guess is not None:
        axes.axvline(guess, color=style.COLOURS[2], linewidth=1.6, label=f"the mean image, seen nothing: {guess:.2f}")
    axes.axvline(0.3, color=style.COLOURS[1], linewidth=1.6, linestyle="--", label="0.3: usual bound of recognition")
    axes.set_yticks(at, [row["attack"] for row in rows])
    axes.set_xlim(min(0.0, *means) * 1.1, 1.0)
    style.dress(axes, x="SSIM of reconstructions with their originals (mean, 95 % CI), low is safer", grid="x")
    style.legend(made, columns=2, loc="outside upper right")
    made.alt = "Bars of SSIM by attack: " + ", ".join(f"{row['attack']} {row['ssim']:.2f}" for row in reversed(rows))
    return made


def reconstructions(run: Run) -> style.Picture:
    """The audit's grid: originals, and what each attack made of them.

    Raises:
        Absent: the run was not audited.
    """
    from matplotlib.image import imread

    file = run.file("audit/audit.png")
    if file is None:
        raise Absent(NOT_AUDITED)
    pixels = imread(file)
    height, width = pixels.shape[:2]
    made = style.picture(ACROSS, ACROSS * height / width)
    made.set_layout_engine("none")
    axes: Any = made.add_axes((0, 0, 1, 1))
    axes.imshow(pixels, interpolation="lanczos")
    axes.set_axis_off()
    made.alt = "Grid of images: originals in the first row, an attack's reconstructions in each other row"
    return made
