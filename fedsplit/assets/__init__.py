"""Weights shipped with fedsplit, found by name."""

from __future__ import annotations

import sys
from pathlib import Path

from fedsplit.types import FedsplitError

SHA256 = {
    "fedsplit_micro.safetensors": "255aa71ff75b359263a4182195a17e6b0c39bf36a6470d517d1d93e50f68df38",
}


def locate(name: str) -> Path:
    """The path of a shipped file, such as `"fedsplit_micro.safetensors"`.

    A Flower bundle holds only code and comes first on `sys.path`, so it shadows the installed
    package with one that has no weights: they are looked for in every entry of `sys.path`.

    Raises:
        FedsplitError: no installed fedsplit holds the file.
    """
    beside = Path(__file__).resolve().parent
    for folder in (beside, *(Path(entry or ".") / "fedsplit" / "assets" for entry in sys.path)):
        file = folder / name
        if file.is_file():
            return file.resolve()
    raise FedsplitError(
        f"{name} is in no installed fedsplit: install fedsplit where this runs (`pip install .` in a checkout), "
        "or set model.checkpoint to a file and model.pretrained to false."
    )
