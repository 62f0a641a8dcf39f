"""Rank-1 and mean average precision of a run's features on queries of classes that it has not seen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsplit import audit
from fedsplit.data import decode
from fedsplit.front import models
from fedsplit.metrics.retrieval import retrieve
from fedsplit.pretrain.probe import features
from fedsplit.types import FedsplitError, Images
from papers.scoreboard import SPLIT

FOUND = "retrieval.json"


def measure(run: str | Path, folder: Path, every: int = 1, before: bool = True) -> dict[str, Any]:
    """`rank1`, `map`, `queries`, `gallery` of the run's model on every `every`-th image of the split in `folder`.

    With `before` also `rank1_before` and `map_before`, of its backbone before the run.

    Raises:
        FedsplitError: no run; no split at `folder`, or one of classes that the run was trained on.
    """
    built = audit.of_run(run, "quick").built
    check(folder, built.config.data.classes)
    sets = {name: load(folder, ids, built.backbone.image_size) for name, ids in chosen(folder, every).items()}
    backbones = {"": built.backbone}
    if before:
        backbones["_before"] = models.create(built.config.model, len(built.data.classes), built.config.seed)
    found: dict[str, Any] = {}
    for suffix, backbone in backbones.items():
        seen = {name: features(backbone, images) for name, images in sets.items()}
        labels = {name: torch.from_numpy(images.labels) for name, images in sets.items()}
        score = retrieve(seen["query"], labels["query"], seen["gallery"], labels["gallery"])
        found |= {f"rank1{suffix}": round(score.rank1, 4), f"map{suffix}": round(score.mean_ap, 4)}
    return {**found, "queries": score.queries, "gallery": score.gallery}


def keep(run: str | Path, folder: Path) -> str:
    """Measure a run of a scoreboard, and leave the figures in its folder; returns them in a few words.

    Raises:
        FedsplitError: as `measure`.
    """
    found = measure(run, folder, before=False)
    (Path(run) / FOUND).write_text(json.dumps(found) + "\n", encoding="utf-8")
    return f"rank-1 {100 * found['rank1']:.1f} %, mAP {100 * found['map']:.1f} %"


def kept(run: Path) -> dict[str, Any]:
    """What `keep` left in a run folder; nothing where it did not."""
    file = run / FOUND
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def check(folder: Path, classes: int) -> None:
    """Check that the split can be read, and is of no class that is trained on: the first `classes`; 0 is all.

    Raises:
        FedsplitError: it cannot, or is.
    """
    wanted = chosen(folder, 1)
    table, place = rows(folder, [name for ids in wanted.values() for name in ids], ["id", "label"])
    first = min(table["label"][place[name]].as_py() for ids in wanted.values() for name in ids)
    if not classes or first < classes:
        raise FedsplitError(
            f"{folder / SPLIT} has images of classes that are trained on; set data.classes={first}, or fewer."
        )


def chosen(folder: Path, every: int) -> dict[str, list[str]]:
    """The ids of query and gallery.

    Raises:
        FedsplitError: there is no such file, or it is of another form.
    """
    try:
        split = json.loads((folder / SPLIT).read_text(encoding="utf-8"))
        found = {name: list(split[name])[::every] for name in ("query", "gallery")}
        if not all(found.values()):
            raise ValueError("no ids")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedsplitError(
            f"{folder / SPLIT} cannot be read ({type(error).__name__}); give a folder that holds it, with lists of "
            "ids under 'query' and 'gallery'."
        ) from None


def load(folder: Path, ids: Sequence[str], size: int) -> Images:
    """The images of these ids, from both Parquet files.

    Raises:
        FedsplitError: a file without a column `id`, or ids that are not there.
    """
    table, place = rows(folder, ids, ["id", "label", "image"])
    table = table.take([place[name] for name in ids])
    blobs = ((place[name], image["bytes"]) for name, image in zip(ids, table["image"].to_pylist(), strict=True))
    pixels = np.concatenate(list(decode.chunks(blobs, size, True, str(folder))))
    return Images(pixels, table["label"].to_numpy().astype(np.int64))


def rows(folder: Path, ids: Sequence[str], columns: Sequence[str]) -> tuple[Any, dict[str, int]]:
    """These columns of both Parquet files, as a table, and where in it each id is.

    Raises:
        FedsplitError: a file without one of them, or ids that are not there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parts = [pq.read_table(folder / f"{part}.parquet", columns=list(columns)) for part in ("train", "test")]
        table = pa.concat_tables(parts)
    except (OSError, pa.ArrowException) as error:
        raise FedsplitError(f"{folder}: {str(error).splitlines()[0]}; it needs columns {', '.join(columns)}.") from None
    place = {name: row for row, name in enumerate(table["id"].to_pylist())}
    if missing := [name for name in ids if name not in place]:
        raise FedsplitError(f"{folder} holds no image '{missing[0]}' of {SPLIT} ({len(missing)} are missing).")
    return table, place
