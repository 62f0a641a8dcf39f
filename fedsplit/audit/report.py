"""What an audit leaves behind: audit.json, audit.csv, images.csv, exposure.csv, a picture grid, and a verdict."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsplit.audit.conduct import Findings
from fedsplit.runs import RunFolder, write
from fedsplit.types import FedsplitError

SHOWN = 8  # victims in the grid
# Figures of an attack, averaged over its seeds; the arrow says what is safer for the devices.
COLUMNS = {
    "ssim": "SSIM ↓",
    "ssim_p90": "p90 ↓",
    "psnr": "PSNR (dB) ↓",
    "mse": "MSE ↑",
    "lpips": "LPIPS ↑",
    "identified": "identified ↓",
    "labels_right": "labels ↓",
}
# Gates: option, the figure that it bounds from above, and what it is.
GATES = {
    "max_ssim": ("worst_ssim", "mean SSIM of the strongest attack"),
    "max_psnr": ("worst_psnr", "mean PSNR (dB) of the strongest attack"),
    "max_identified": ("worst_identified", "fraction of reconstructions that are recognised"),
    "max_labels": ("worst_labels_right", "fraction of labels that are inferred"),
}
UNRECOGNISABLE = 0.3  # SSIM, He, Zhang and Lee (ACSAC 2019)


def check_gates(gates: Iterable[str], finds: Collection[str]) -> None:
    """Whether attacks that find `finds` ("images", "labels") measure what the gates judge.

    Raises:
        FedsplitError: they do not.
    """
    for option in gates:
        if ("labels" if option == "max_labels" else "images") not in finds:
            raise FedsplitError(
                f"--{option.replace('_', '-')} has nothing to judge: no attack of this audit measures it."
            )


def by_attack(findings: Findings) -> list[dict[str, Any]]:
    """A row an attack: means over its seeds, the spread of its SSIM over them, and the steps of one seed."""
    rows = []
    for name in dict.fromkeys(row["attack"] for row in findings.rows):
        mine = [row for row in findings.rows if row["attack"] == name]
        merged: dict[str, Any] = {"attack": name, "seeds": len(mine), "finds": mine[0]["finds"]}
        for figure in mine[0]:
            if figure not in ("attack", "seed", "finds"):
                merged[figure] = statistics.fmean(row[figure] for row in mine)
        if "ssim" in merged:
            spread = statistics.stdev(row["ssim"] for row in mine) if len(mine) > 1 else None
            merged["ssim_std_over_seeds"] = spread
        rows.append(merged)
    return rows


def document(findings: Findings, about: Mapping[str, Any], gates: Mapping[str, float]) -> dict[str, Any]:
    """audit.json: `about` the run, the attacks, the worst of each figure, and the gates with what they say."""
    rows = by_attack(findings)
    worst: dict[str, Any] = {}
    for figure in ("ssim", "psnr", "identified", "labels_right"):
        there = [row for row in rows if figure in row]
        worst[f"worst_{figure}"] = max((row[figure] for row in there), default=None)
    strongest = max((row for row in rows if "ssim" in row), key=lambda row: row["ssim"], default=None)
    verdicts = []
    for option, bound in gates.items():
        figure, what = GATES[option]
        value = worst[figure]
        if value is None:  # an attack that turned out not to apply
            check_gates([option], ())
        verdicts.append({"gate": option, "what": what, "value": value, "bound": bound, "passed": value <= bound})
    return {
        **about,
        **worst,
        "worst_attack": strongest["attack"] if strongest else None,
        "unrecognisable": worst["worst_ssim"] is not None and worst["worst_ssim"] < UNRECOGNISABLE,
        "gates": verdicts,
        "passed": all(verdict["passed"] for verdict in verdicts) if verdicts else None,
        "attacks": rows,
        "mean_image": {name: value for name, value in findings.baseline.items() if name in COLUMNS},
        "clean_identified": findings.clean_identified,
        "skipped": dict(findings.skipped),
    }


def save(folder: Path, findings: Findings, found: Mapping[str, Any], devices: Sequence[Mapping[str, Any]]) -> None:
    """Write everything, audit.json last."""
    rows = [_directed(row) for row in findings.rows]
    empty = dict.fromkeys((name for row in rows for name in row), "")  # labels have other scores than images
    tables = {"audit": [{**empty, **row} for row in rows], "images": findings.images, "exposure": devices}
    for name, table in tables.items():
        if table:
            RunFolder(folder).table(name, table)
    grid(folder / "audit.png", findings, found["attacks"])
    write(folder / "audit.json", json.dumps(found, indent=2) + "\n")


def grid(path: Path, findings: Findings, attacks: Sequence[Mapping[str, Any]]) -> None:
    """Draw originals and reconstructions, an attack a row, with the SSIM of each; the seed is the most successful."""
    from fedsplit.report import style

    place = findings.scene
    count = min(SHOWN, len(place.ids))
    ssim = {(row["attack"], row["seed"], row["sample"]): row["ssim"] for row in findings.images}
    best: dict[str, tuple[float, int]] = {}
    for row in findings.rows:
        if row["finds"] == "images" and row["ssim"] > best.get(row["attack"], (-2.0, 0))[0]:
            best[row["attack"]] = (row["ssim"], row["seed"])
    shown: list[tuple[str, Tensor, int | None]] = [("original", place.originals, None)]
    for result in findings.results:
        if result.attack in best and result.seed == best[result.attack][1]:
            shown.append((result.attack, result.found, result.seed))
    picture = style.picture(1.1 * count + 1.2, 1.3 * len(shown))
    axes = picture.subplots(len(shown), count, squeeze=False)
    for line, (name, images, seed) in zip(axes, shown, strict=True):
        for at, axis in enumerate(line):
            axis.imshow(images[at].permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            title = f"sample {place.ids[at]}" if seed is None else f"{ssim[name, seed, int(place.ids[at])]:.2f}"
            axis.set_title(title, fontsize=style.SMALL, pad=2)
        line[0].set_ylabel(name, fontsize=style.SMALL)
    picture.suptitle("Reconstructions and their SSIM (low is safer)", fontsize=style.NORMAL)
    picture.save(path)


def _directed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of audit.csv: what is safer stands in the names."""
    safer = {"mse": "mse_high_is_safer", "lpips": "lpips_high_is_safer"}
    low = ("psnr", "ssim", "ssim_ci_low", "ssim_ci_high", "ssim_p90", "ssim_most", "identified", "labels_right")
    return {safer.get(name, f"{name}_low_is_safer" if name in low else name): value for name, value in row.items()}
