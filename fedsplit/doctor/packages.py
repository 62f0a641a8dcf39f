"""The packages and weights of this environment, against what fedsplit's own metadata asks for."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fedsplit.doctor.check import Check

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# Extras that no run needs.
_UNCHECKED_EXTRAS = {"dev", "notebooks"}


def python() -> Iterator[Check]:
    """Python's version, against what fedsplit says it needs."""
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    supported = SpecifierSet(importlib.metadata.metadata("fedsplit")["Requires-Python"] if _installed() else "")
    if supported.contains(version, prereleases=True):
        yield Check("Python", "ok", version)
    else:
        yield Check("Python", "error", version, f"Use Python {supported}.")


def packages(needed: Sequence[str] = ()) -> Iterator[Check]:
    """One check for every package that fedsplit asks for, itself or in an extra; in `needed` extras alone, if given.

    What a needed extra asks for must be there; of other extras it may be missing.
    """
    if not _installed():
        yield Check("fedsplit", "error", "not installed", "pip install . in a checkout, in the environment of the run.")
        return
    yield Check("fedsplit", "ok", importlib.metadata.version("fedsplit"))
    wanted: dict[str, Requirement] = {}
    extras_of: dict[str, list[str]] = {}
    for extra in ("", *(needed or _extras())):
        for requirement in _requirements("fedsplit", extra):
            for one in (requirement, *_through_extras(requirement)):
                wanted.setdefault(one.name, one)
                extras_of.setdefault(one.name, []).append(extra)
    for name, requirement in wanted.items():
        yield _package(requirement, [] if needed or "" in extras_of[name] else extras_of[name])


def torchvision() -> Iterator[Check]:
    """Torchvision, which names the one torch that it was built for."""
    from fedsplit import compat

    try:
        version, torch = (importlib.metadata.version(name) for name in ("torchvision", "torch"))
    except importlib.metadata.PackageNotFoundError as error:
        yield Check("torchvision", "error", f"{error.name} is not installed", "pip install torch torchvision together.")
        return
    asked = next((one for one in _requirements("torchvision", "") if one.name == "torch"), None)
    if asked is not None and not asked.specifier.contains(torch, prereleases=True):
        pair = f"{version} was built for torch{asked.specifier}, not {torch}"
        yield Check("torchvision", "error", pair, "pip install --upgrade torch torchvision together.")
    elif compat.operators_load():
        yield Check("torchvision", "ok", f"{version}, its compiled operators load")
    else:
        yield Check("torchvision", "ok", f"{version}; its compiled operators do not load here, and are not needed")


def weights() -> Iterator[Check]:
    """The weights that fedsplit ships, read and compared with their known sums."""
    from fedsplit import assets

    for name, known in assets.SHA256.items():
        yield _weights(name, known)


def _weights(name: str, known: str) -> Check:
    from safetensors import SafetensorError, safe_open

    from fedsplit import assets
    from fedsplit.types import FedsplitError

    again = "Install fedsplit again."
    try:
        file = assets.locate(name)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        with safe_open(file, framework="numpy") as tensors:
            count = len(list(tensors.keys()))
    except FedsplitError as error:
        return Check(name, "error", "missing", str(error))
    except (OSError, SafetensorError) as error:
        return Check(name, "error", f"unreadable: {error}", again)
    if digest != known:
        return Check(name, "error", f"changed: sha256 {digest[:12]}, not {known[:12]}", again)
    return Check(name, "ok", f"{count} tensors, sha256 {digest[:12]}")


def _installed() -> bool:
    return any(True for _ in importlib.metadata.distributions(name="fedsplit"))


def _extras() -> list[str]:
    found = importlib.metadata.metadata("fedsplit").get_all("Provides-Extra") or []
    return [extra for extra in found if extra not in _UNCHECKED_EXTRAS]


def _requirements(package: str, extra: str) -> list[Requirement]:
    """What a package asks for in one extra alone, or without any (`""`)."""
    from packaging.requirements import Requirement

    def holds(requirement: Requirement, extra: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": extra})

    try:
        found = [Requirement(text) for text in importlib.metadata.requires(package) or []]
    except importlib.metadata.PackageNotFoundError:
        return []
    return [one for one in found if holds(one, extra) and (extra == "" or not holds(one, ""))]


def _through_extras(requirement: Requirement) -> list[Requirement]:
    """What the extras of a requirement bring: ray, for `flwr[simulation]`."""
    return [one for extra in sorted(requirement.extras) for one in _requirements(requirement.name, extra)]


def _package(requirement: Requirement, extras: list[str]) -> Check:
    name, supported = requirement.name, str(requirement.specifier)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if extras:
            return Check(
                name, "warning", f"not installed, for {', '.join(extras)}", f"pip install 'fedsplit[{extras[0]}]'"
            )
        return Check(name, "error", "not installed", f"pip install '{name}{supported}'")
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(name, "error", f"{version}, but fedsplit needs {supported}", f"pip install '{name}{supported}'")
    return Check(name, "ok", version)
