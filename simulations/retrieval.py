"""Rank-1 and mean average precision of a finished run's features: re-identification, the task of PATROL's paper.

    fedsplit run --set data.source=FOLDER --set data.classes=98 ... --out RUN
    python simulations/retrieval.py RUN --data FOLDER

FOLDER holds train.parquet and test.parquet with a column `id`, and retrieval_split.json with the ids of `query` and
`gallery`, of classes that the run has not seen. An image's features are what the classifier would read. Beside them
stand the features of the backbone as the run began. Prints one line of JSON last: `rank1`, `map`, `rank1_before`,
`map_before`, `queries`, `gallery`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsplit import audit
from fedsplit.data import decode
from fedsplit.front import models
from fedsplit.metrics.retrieval import Retrieval, retrieve
from fedsplit.pretrain.probe import features
from fedsplit.types import FedsplitError, Images

SPLIT = "retrieval_split.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--data", required=True, metavar="FOLDER", help=f"folder with {SPLIT}")
    parser.add_argument("--quick", action="store_true", help="a tenth of the images")
    options = parser.parse_args(arguments)
    try:
        print(json.dumps(measure(options.run, Path(options.data), 10 if options.quick else 1)))
    except FedsplitError as error:
        print(f"retrieval.py: {error}", file=sys.stderr)
        return 2
    return 0


def measure(run: str, folder: Path, every: int) -> dict[str, Any]:
    """The figures of the run's model, and of its backbone before the run, on every `every`-th image.

    Raises:
        FedsplitError: no run, or no split at `folder`.
    """
    built = audit.of_run(run, "quick").built
    sets = {name: load(folder, ids, built.backbone.image_size) for name, ids in chosen(folder, every).items()}
    fresh = models.create(built.config.model, len(built.data.classes), built.config.seed)
    found = {}
    for suffix, backbone in (("", built.backbone), ("_before", fresh)):
        seen: dict[str, Tensor] = {name: features(backbone, images) for name, images in sets.items()}
        labels = {name: torch.from_numpy(images.labels) for name, images in sets.items()}
        score: Retrieval = retrieve(seen["query"], labels["query"], seen["gallery"], labels["gallery"])
        found |= {f"rank1{suffix}": round(score.rank1, 4), f"map{suffix}": round(score.mean_ap, 4)}
        print(
            f"{suffix[1:] or 'after':<7} rank-1 {100 * score.rank1:.1f} %  mAP {100 * score.mean_ap:.1f} %", flush=True
        )
    return {**found, "queries": score.queries, "gallery": score.gallery}


def chosen(folder: Path, every: int) -> dict[str, list[str]]:
    """The ids of query and gallery.

    Raises:
        FedsplitError: there is no such file, or it is of another form.
    """
    try:
        split = json.loads((folder / SPLIT).read_text(encoding="utf-8"))
        return {name: list(split[name])[::every] for name in ("query", "gallery")}
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
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ["id", "label", "image"]
    try:
        table = pa.concat_tables(
            [pq.read_table(folder / f"{part}.parquet", columns=columns) for part in ("train", "test")]
        )
    except (OSError, pa.ArrowException) as error:
        raise FedsplitError(f"{folder}: {str(error).splitlines()[0]}; it needs columns id, label and image.") from None
    place = {name: row for row, name in enumerate(table["id"].to_pylist())}
    if missing := [name for name in ids if name not in place]:
        raise FedsplitError(f"{folder} holds no image '{missing[0]}' of {SPLIT} ({len(missing)} are missing).")
    rows = table.take([place[name] for name in ids])
    blobs = ((place[name], image["bytes"]) for name, image in zip(ids, rows["image"].to_pylist(), strict=True))
    pixels = np.concatenate(list(decode.chunks(blobs, size, True, str(folder))))
    return Images(pixels, rows["label"].to_numpy().astype(np.int64))


if __name__ == "__main__":
    sys.exit(main())
