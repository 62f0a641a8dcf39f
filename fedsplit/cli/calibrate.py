"""`fedsplit doctor --calibrate`: this machine as a device profile."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from fedsplit.config import load
from fedsplit.devices.calibrate import measure, profile_of
from fedsplit.types import FedsplitError


def carry_out(options: argparse.Namespace) -> int:
    """Measure, write the profile, and say what was measured; returns the exit code."""
    if not (options.out or "").endswith(".toml"):
        raise FedsplitError("doctor --calibrate writes a profile: say where with --out, e.g. --out this-machine.toml.")
    config, path = load(options.config, options.set), Path(options.out)
    if not path.resolve().parent.is_dir():
        raise FedsplitError(f"Cannot write {path}: there is no folder {path.parent}.")
    found = measure(config)
    profile, text = profile_of(config, found, path.stem)
    path.write_text(text, encoding="utf-8")
    if options.json:
        print(json.dumps({**asdict(found), "profile": asdict(profile), "file": str(path)}, indent=2))
        return 0
    print(
        f"{found.train_flops_per_s / 1e9:.3g} GFLOP/s in training, {found.infer_flops_per_s / 1e9:.3g} GFLOP/s in "
        f"inference; a step of {found.samples} samples takes {found.step_s:.3g} s here\n{path}"
    )
    return 0
