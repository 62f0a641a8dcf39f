"""Privacy against accuracy against the client's work: what nothing else beats is ringed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from fedsplit.report import style
from fedsplit.report.groups import Group, as_groups
from fedsplit.report.reading import Absent, Run

SMALLEST, LARGEST = 30.0, 320.0  # areas of discs, in square points


@dataclass(frozen=True)
class Point:
    """A point of a study: means over its seeds; `mark` is written beside it, points of a `kind` have a colour."""

    kind: str
    mark: str
    accuracy: float
    worst_ssim: float
    client_flops: float

    @property
    def figures(self) -> tuple[float, float, float]:
        """The less, the better, in each."""
        return -self.accuracy, self.worst_ssim, self.client_flops


def unbeaten(points: Sequence[Point]) -> list[bool]:
    """Of each point, whether no other is at least as good in accuracy, SSIM and client FLOPs, and better in one."""

    def beaten(point: Point) -> bool:
        mine = point.figures
        return any(
            all(a <= b for a, b in zip(other.figures, mine, strict=True)) and other.figures != mine for other in points
        )

    return [not beaten(point) for point in points]


def tradeoff(runs: Run | Group | Sequence[Run | Group]) -> style.Picture:
    """Accuracy against the strongest attack's SSIM: left is safer, up is better, a larger disc is more client work.

    A colour is what defends the front, the number beside a disc the blocks at the client. Rings are points than which
    no other is safer, more accurate and cheaper for clients. Dashed is the usual bound, 0.3.

    Raises:
        Absent: no run was audited.
    """
    points = [point for group in as_groups(runs) if (point := _point(group))]
    if not points:
        raise Absent("No run was audited: fedsplit audit RUN, or audit in a study, has an attacker measure it.")
    return drawn(points)


def drawn(points: Sequence[Point]) -> style.Picture:
    """The picture of `points`."""
    made = style.picture(8.4, 4.8)
    axes: Any = made.subplots()
    most = max(point.client_flops for point in points) or 1.0
    best = unbeaten(points)
    kinds = list(dict.fromkeys(point.kind for point in points))
    for number, kind in enumerate(kinds):
        how = style.look(number)
        mine = [(point, ring) for point, ring in zip(points, best, strict=True) if point.kind == kind]
        areas = [SMALLEST + (LARGEST - SMALLEST) * point.client_flops / most for point, _ in mine]
        axes.scatter(
            [point.worst_ssim for point, _ in mine],
            [100 * point.accuracy for point, _ in mine],
            s=areas,
            color=how["color"],
            marker=how["marker"],
            alpha=0.75,
            linewidths=0,
            label=kind,
        )
        for (point, ring), area in zip(mine, areas, strict=True):
            at = (point.worst_ssim, 100 * point.accuracy)
            axes.annotate(point.mark, at, (5 + area**0.5 / 3, 3), textcoords="offset points", fontsize=style.SMALL)
            if ring:
                axes.scatter(*at, s=area + 90, facecolors="none", edgecolors=style.INK, linewidths=1.1)
    axes.axvline(0.3, color=style.MUTED, linewidth=1.2, linestyle="--")
    axes.set_xlim(min(0.0, *(point.worst_ssim for point in points)), 1.02)
    axes.margins(y=0.15)
    style.dress(axes, x="SSIM of the strongest attack (low is safer; dashed: 0.3)", y="test accuracy (%)")
    shown = style.legend(made, loc="outside right upper")
    for handle in shown.legend_handles:
        handle.set_sizes([60.0])
    made.alt = "Scatter of accuracy in percent against the strongest attack's SSIM: " + "; ".join(
        f"{point.kind} {point.mark}: {100 * point.accuracy:.1f} % at {point.worst_ssim:.2f}" for point in points
    )
    made.note = f"The largest disc is {most / style.GIGA:,.3g} GFLOP of all clients."
    return made


def _point(group: Group) -> Point | None:
    config = group.runs[0].config
    defences = ",".join(filter(None, (str(config.get(key, "")) for key in ("front.edits", "front.penalties"))))
    found = [group.figure(name) for name in ("accuracy", "worst_ssim", "client_flops")]
    if any(each is None or not math.isfinite(each[0]) for each in found):
        return None
    checkpoint = PurePath(str(config.get("model.checkpoint", "")))
    kind = defences or ("hardened" if checkpoint.name else "no defence")
    return Point(kind, str(config.get("cut.front", "")), *(each[0] for each in found if each))
