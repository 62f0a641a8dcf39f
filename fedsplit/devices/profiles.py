"""What kinds of devices there are, and which kind each device of a run is.

A profile is a TOML file: those of `fedsplit/devices/catalogue` (`configs/devices` is a link to it), by file name
or by the `short` name inside, or one of the user's own, by path.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np

from fedsplit.rng import key, numpy_rng
from fedsplit.settings import Settings
from fedsplit.types import FedsplitError, split_names

PRECISIONS = ("fp32", "fp16")


@dataclass(frozen=True)
class Profile:
    """A kind of device. A rate of 0 is infinite, a memory or storage of 0 is without limit.

    Rates are sustained ones: `train` for steps forward and backward, `infer` for forward passes alone.
    `precision` says which of them counts; it changes the virtual clock, never a result.
    """

    name: str
    train_fp32_flops_per_s: float = 0.0
    train_fp16_flops_per_s: float = 0.0
    infer_fp32_flops_per_s: float = 0.0
    infer_fp16_flops_per_s: float = 0.0
    memory_bytes: int = 0
    storage_bytes: int = 0
    down_bytes_per_s: float = 0.0
    up_bytes_per_s: float = 0.0
    latency_s: float = 0.0
    active_w: float = 0.0
    idle_w: float = 0.0
    precision: str = "fp32"

    def train_s(self, flops: float) -> float:
        """Seconds of `flops` in training steps."""
        return _ratio(flops, getattr(self, f"train_{self.precision}_flops_per_s"))

    def infer_s(self, flops: float) -> float:
        """Seconds of `flops` in passes that only go forward."""
        return _ratio(flops, getattr(self, f"infer_{self.precision}_flops_per_s"))

    def compute_s(self, flops: float, infer_flops: float) -> float:
        """Seconds of `flops`, of which `infer_flops` only go forward."""
        rates = (getattr(self, f"{kind}_{self.precision}_flops_per_s") for kind in ("train", "infer"))
        if len(set(rates)) == 1:
            return self.train_s(flops)
        return self.train_s(flops - infer_flops) + self.infer_s(infer_flops)

    def download_s(self, count_bytes: float) -> float:
        """Seconds to receive so many bytes; every message adds `latency_s`."""
        return _ratio(count_bytes, self.down_bytes_per_s)

    def upload_s(self, count_bytes: float) -> float:
        """Seconds to send so many bytes; every message adds `latency_s`."""
        return _ratio(count_bytes, self.up_bytes_per_s)

    def varied(self, compute: float, down: float, up: float) -> Profile:
        """A device of this kind whose rates differ by these factors."""
        rates = {
            name: getattr(self, name) * compute
            for name in (field.name for field in dataclasses.fields(self))
            if name.endswith("flops_per_s")
        }
        down, up = self.down_bytes_per_s * down, self.up_bytes_per_s * up
        return replace(self, **rates, down_bytes_per_s=down, up_bytes_per_s=up)


FIGURES = tuple(field.name for field in dataclasses.fields(Profile) if field.name not in ("name", "precision"))


def fleet_of(config: Settings, count: int) -> tuple[Profile, ...]:
    """The profile of each of `count` devices: `devices.fleet`, or the uniform rates of `devices.*` without one.

    The weights of the mixture are met as closely as whole devices allow (largest remainder, the first named
    first), and dealt by a seeded permutation. `devices.jitter` is the standard deviation of the logarithm of three
    seeded factors a device: on its compute, down and up rates; their median is 1.

    Raises:
        FedsplitError: a fleet that names no known profile, or a weight that is none.
    """
    devices = config.devices
    if not devices.fleet:
        kinds = [_uniform(config)] * count
    else:
        mixture = _mixture(devices.fleet)
        shares = np.array([weight for _, weight in mixture]) * count / sum(weight for _, weight in mixture)
        counts = np.floor(shares + 1e-9).astype(int)
        counts[np.argsort(counts - shares, kind="stable")[: count - counts.sum()]] += 1
        listed = [profile for (profile, _), times in zip(mixture, counts, strict=True) for _ in range(times)]
        order = numpy_rng(key(config.seed, "fleet")).permutation(count)
        kinds = [replace(listed[place], precision=devices.precision) for place in order]
    if not devices.jitter:
        return tuple(kinds)
    factors = (numpy_rng(key(config.seed, "fleet", "jitter", device)).standard_normal(3) for device in range(count))
    return tuple(
        kind.varied(*(float(factor) for factor in np.exp(devices.jitter * factor)))
        for kind, factor in zip(kinds, factors, strict=True)
    )


def catalogue() -> dict[str, Traversable]:
    """The files of the profiles that ship with fedsplit, by name."""
    folder = resources.files("fedsplit.devices") / "catalogue"
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return {file.name.removesuffix(".toml"): file for file in files if file.name.endswith(".toml")}


@cache
def shipped() -> dict[str, Profile]:
    """The profiles that ship with fedsplit, by name and by short name."""
    found: dict[str, Profile] = {}
    for name, file in catalogue().items():
        values = tomllib.loads(file.read_text(encoding="utf-8"))
        found[name] = found[str(values.get("short", name))] = read(name, values)
    return found


def profile(name: str) -> Profile:
    """A profile by name, by short name, or by the path of a TOML file.

    Raises:
        FedsplitError: there is none, or its file is wrong.
    """
    if not name.endswith(".toml"):
        if name not in shipped():
            close = difflib.get_close_matches(name, list(shipped()), n=1)
            hint = f" (did you mean '{close[0]}'?)" if close else ""
            raise FedsplitError(
                f"devices.fleet names no profile '{name}'{hint}; known: {', '.join(shipped())}, or the path of a "
                ".toml file."
            )
        return shipped()[name]
    path = Path(name).expanduser()
    try:
        return read(path.stem, tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise FedsplitError(f"Cannot read the device profile {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FedsplitError(f"The device profile {path} is not valid TOML: {error}.") from None


def read(name: str, values: dict[str, Any]) -> Profile:
    """A profile from the keys of its file.

    Raises:
        FedsplitError: a key that is unknown or missing, or a figure that is none.
    """
    figures = {key.replace("-", "_"): value for key, value in values.items() if key != "short"}
    for figure in (*figures, *FIGURES):
        word = figure.replace("_", "-")
        if figure not in FIGURES:
            known = ", ".join(name.replace("_", "-") for name in FIGURES)
            raise FedsplitError(f"Device profile {name}: unknown key '{word}'; known: short, {known}.")
        if figure not in figures:
            raise FedsplitError(f"Device profile {name}: '{word}' is missing; 0 is without limit.")
        value = figures[figure]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise FedsplitError(f"Device profile {name}: {word} must be a number of at least 0, got {value!r}.")
        figures[figure] = int(value) if figure in ("memory_bytes", "storage_bytes") else float(value)
    return Profile(name, **figures)


def _mixture(fleet: str) -> list[tuple[Profile, float]]:
    """The profiles of a fleet and their weights: `"pi4:6,boards/own.toml:2"`; a weight left out is 1."""
    found = []
    for entry in split_names(fleet):
        name, colon, text = entry.rpartition(":")
        try:
            weight = float(text) if colon else 1.0
        except ValueError:
            weight = 0.0
        if not 0 < weight < math.inf:
            raise FedsplitError(f"devices.fleet: '{entry}' needs a weight above 0, e.g. {name or entry}:2.")
        found.append((profile((name if colon else entry).strip()), weight))
    if not found:
        raise FedsplitError("devices.fleet names no profile; write e.g. 'pi4:6,orin-nano:3', or leave it empty.")
    return found


def _uniform(config: Settings) -> Profile:
    """The one kind of device of the keys `devices.*`."""
    devices = config.devices
    rates: dict[str, Any] = dict.fromkeys(
        (name for name in FIGURES if name.endswith("flops_per_s")), devices.flops_per_s
    )
    return Profile(
        "uniform",
        **rates,
        down_bytes_per_s=devices.down_bytes_per_s,
        up_bytes_per_s=devices.up_bytes_per_s,
        latency_s=devices.latency_s,
        active_w=devices.active_w,
    )


def _ratio(amount: float, rate: float) -> float:
    return amount / rate if rate else 0.0
