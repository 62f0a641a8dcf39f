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

from papers.rank import measure
from papers.scoreboard import SPLIT

from fedsplit.types import FedsplitError


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--data", required=True, metavar="FOLDER", help=f"folder with {SPLIT}")
    parser.add_argument("--quick", action="store_true", help="a tenth of the images")
    options = parser.parse_args(arguments)
    try:
        found = measure(options.run, Path(options.data), 10 if options.quick else 1)
    except FedsplitError as error:
        print(f"retrieval.py: {error}", file=sys.stderr)
        return 2
    for when, suffix in (("after", ""), ("before", "_before")):
        print(f"{when:<7} rank-1 {100 * found[f'rank1{suffix}']:.1f} %  mAP {100 * found[f'map{suffix}']:.1f} %")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
