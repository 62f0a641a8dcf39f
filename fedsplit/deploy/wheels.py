"""The wheels that fedsplit needs on another machine, as pip finds them.

pip can download for another platform, but it reads the conditions of requirements for the machine that it runs
on. So they are followed here, one wheel at a time: what a wheel asks for stands in its own metadata, and the
version of each is pinned.
"""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedsplit.types import FedsplitError

_PLATFORM = re.compile(r"manylinux_2_(\d+)_(x86_64|aarch64)")
# Older names of the same tags, by minor version of glibc.
_OLD_NAMES = {"aarch64": {17: "manylinux2014"}, "x86_64": {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}}
_FIRST_GLIBC = {"aarch64": 17, "x86_64": 5}
_CUDA = re.compile(r"(nvidia|cuda)-")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

Fetch = Callable[[str, "Target", Path], Path]


@dataclass(frozen=True)
class Target:
    """The machine that wheels are for: a manylinux `platform` and a `python` such as "3.11"."""

    platform: str
    python: str

    def __post_init__(self) -> None:
        found = _PLATFORM.fullmatch(self.platform)
        if not found or int(found[1]) < _FIRST_GLIBC[found[2]]:
            raise FedsplitError(
                f"--platform '{self.platform}' is not known; write manylinux_2_NN_aarch64 or manylinux_2_NN_x86_64, "
                "where 2.NN is the device's glibc (ldd --version) or an older one, e.g. manylinux_2_28_aarch64."
            )
        if not re.fullmatch(r"3\.\d+", self.python) or int(self.python[2:]) < 11:
            raise FedsplitError(f"--python must be 3.11 or newer, as Flower needs it; got '{self.python}'.")

    @property
    def machine(self) -> str:
        """The architecture, as `uname -m` says it."""
        return self.platform.split("_", 3)[3]

    @property
    def glibc(self) -> int:
        """The minor version of the glibc, 28 for 2.28."""
        return int(self.platform.split("_", 3)[2])

    @property
    def platforms(self) -> list[str]:
        """Tags of every wheel that runs there: pip takes a platform to the letter."""
        names = _OLD_NAMES[self.machine]
        tags: list[str] = []
        for minor in range(self.glibc, _FIRST_GLIBC[self.machine] - 1, -1):
            tags += [f"manylinux_2_{minor}_{self.machine}"]
            tags += [f"{names[minor]}_{self.machine}"] if minor in names else []
        return [*tags, f"linux_{self.machine}"]

    def holds(self, requirement: Requirement, extra: str) -> bool:
        """Whether the condition of a requirement is true there."""
        if requirement.marker is None:
            return True
        there = {
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",  # the oldest: at worst one backport too many
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": "linux",
            "extra": extra,
        }
        return requirement.marker.evaluate(there)


class NotServed(FedsplitError):
    """pip's index has no wheel of that version for that machine."""


def closure(
    own: Path, extras: set[str], target: Target, pins: Mapping[str, str], get: Callable[[str], Path], cuda: bool
) -> None:
    """Get the wheels that the wheel `own` with `extras` needs on `target`, pip's own first, each once.

    `get` brings the wheel of a requirement; `pins` are versions by canonical name. Without `cuda` a torch that
    brings CUDA is refused.

    Raises:
        FedsplitError: a wheel that cannot be had, pins that do not go together, or a torch for CUDA.
    """
    get("pip")
    files: dict[str, Path] = {"fedsplit": own}
    done: set[tuple[str, str]] = set()
    waiting = deque([("fedsplit", extra) for extra in ("", *sorted(extras))])
    while waiting:
        name, extra = waiting.popleft()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        for requirement in _requirements(files[name]):
            if not target.holds(requirement, extra):
                continue
            needed = canonicalize_name(requirement.name)
            if needed not in files:
                asked = f"{needed}=={pins[needed]}" if needed in pins else f"{needed}{requirement.specifier}"
                files[needed] = get(asked)
                if needed == "torch" and not cuda:
                    _check_cpu(files[needed], target)
            _check_version(name, requirement, files[needed])
            waiting += [(needed, one) for one in ("", *sorted(requirement.extras))]


def download(asked: str, target: Target, folder: Path) -> Path:
    """Let pip put the wheel of the requirement `asked` into `folder`, all of it or nothing.

    Raises:
        FedsplitError: pip has no wheel for `target`, or fails.
    """
    with tempfile.TemporaryDirectory(prefix=".download.", dir=folder) as scratch:
        done = subprocess.run(_command(asked, target, scratch), capture_output=True, text=True)
        found = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(found) != 1:
            raise _refusal(asked, target, done.stderr)
        return Path(shutil.move(found[0], folder / found[0].name))


def _command(asked: str, target: Target, folder: str) -> list[str]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--implementation", "cp", "--python-version", target.python]
    for platform in target.platforms:
        command += ["--platform", platform]
    return [*command, "--dest", folder, asked]


def _refusal(asked: str, target: Target, said: str) -> FedsplitError:
    if "No matching distribution" in said:
        return NotServed(
            f"pip's index has no wheel of {asked} for {target.platform} and Python {target.python}: give pip an index "
            "that has one (PIP_EXTRA_INDEX_URL), another --pin NAME=VERSION, or a folder of wheels (PIP_FIND_LINKS)."
        )
    errors = [line.removeprefix("ERROR:").strip() for line in said.splitlines() if line.startswith("ERROR:")]
    reason = (errors or said.strip().splitlines() or ["no reason given"])[-1].rstrip(".")
    return FedsplitError(
        f"pip could not download {asked} ({reason}): mend that and run the same command again; it goes on from here."
    )


def _requirements(wheel: Path) -> list[Requirement]:
    """What a wheel asks for, by its metadata."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
            message = email.message_from_bytes(archive.read(name))
    except (zipfile.BadZipFile, StopIteration):
        raise FedsplitError(f"{wheel} is no wheel; remove it and run the same command again.") from None
    return [Requirement(str(text)) for text in message.get_all("Requires-Dist") or []]


def _check_version(by: str, requirement: Requirement, wheel: Path) -> None:
    version = wheel.name.split("-")[1]
    if not requirement.specifier.contains(version, prereleases=True):
        raise FedsplitError(
            f"{by} needs {requirement.name}{requirement.specifier}, but the bundle has {version}: pin versions that go "
            f"together, e.g. --pin {requirement.name}=VERSION."
        )


def _check_cpu(wheel: Path, target: Target) -> None:
    for requirement in _requirements(wheel):
        if _CUDA.match(canonicalize_name(requirement.name)) and target.holds(requirement, ""):
            version = wheel.name.split("-")[1]
            wheel.unlink()
            raise FedsplitError(
                f"The torch {version} of pip's index for {target.machine} is built for CUDA and brings gigabytes more "
                f"with it: set PIP_EXTRA_INDEX_URL={CPU_INDEX}, which has builds for the CPU, or take this one with "
                "--torch any, or a release without CUDA with --pin torch=VERSION --pin torchvision=VERSION."
            )
