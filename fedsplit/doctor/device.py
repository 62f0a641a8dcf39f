"""What a device of a deployment needs: no Ray, no data sets, no plots, but a server that it can reach and trust."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fedsplit
from fedsplit.config import Config
from fedsplit.doctor import machine, packages
from fedsplit.doctor.check import Check
from fedsplit.types import FedsplitError

MIB = 2**20
WAIT_S = 10.0
CHILD_S = 300.0
SYNCHRONISED = Path("/run/systemd/timesync/synchronized")
# What of a processor's features makes matrices fast, by the names of /proc/cpuinfo.
FEATURES = ("asimd", "atomics", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "fma", "avx2", "avx512f", "amx_tile")

# A process of its own: an instruction that the processor lacks ends it, and its memory is that of a client.
CLIENT = """
import json, resource, sys
import fedsplit.client_app
from fedsplit.doctor.machine import small_step
small_step()
at_most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps(at_most))
"""


@dataclass(frozen=True)
class Asked:
    """What to check for. `config` and the `folder` that it is in; `superlinks` as host:port; `authority` is the
    file of the certificate that signs the server's; `state` is where the device keeps things.
    """

    config: Config | None
    folder: Path | None
    superlinks: tuple[str, ...]
    authority: Path | None
    state: Path


def groups(asked: Asked) -> tuple[Callable[[], Iterator[Check]], ...]:
    """The checks of a device, in the order in which one would mend them."""

    def installed() -> Iterator[Check]:
        return packages.packages(["device"])

    def client() -> Iterator[Check]:
        return _client(asked)

    def state() -> Iterator[Check]:
        return _state(asked.state)

    def clock() -> Iterator[Check]:
        return _clock(asked.authority)

    def superlink() -> Iterator[Check]:
        for address in asked.superlinks:
            yield _superlink(address, asked.authority)

    return packages.python, installed, packages.torchvision, _processor, client, state, clock, superlink


def client_memory_bytes(config: Config) -> int:
    """The most that a client's part of `config` holds in memory, by the account of `fedsplit plan`, over all clients.

    Raises:
        FedsplitError: as `fedsplit.world.ghost`, such as data that cannot be had here.
    """
    from dataclasses import replace

    from fedsplit.book import Book
    from fedsplit.hollow import HollowCache
    from fedsplit.world import ghost

    world = ghost(config)
    if world.cache is not None:
        cache = HollowCache(world.cache.front, world.cache.start, config, world.data.train, world.look)
        world = replace(world, cache=cache)
    book = Book(world)
    in_memory = config.front.cache_memory_bytes
    return max(book.client_peak(one) + min(book.kept_bytes(one), in_memory) for one in range(len(world.shards)))


def _processor() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    known: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, values = line.partition(":")
            if name.strip().lower() in ("flags", "features"):
                known |= set(values.split())
    features = ", ".join(name for name in FEATURES if name in known) or "not known"
    found = f"{platform.machine()}, {cores} cores; {features}"
    if platform.machine() in ("x86_64", "aarch64", "arm64", "AMD64"):
        yield Check("processor", "ok", found)
    else:
        yield Check("processor", "error", found, "Install a 64-bit system: torch has no wheels for this processor.")


def _client(asked: Asked) -> Iterator[Check]:
    """A client's process: whether torch computes here, and whether the memory suffices for the config."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT], capture_output=True, text=True, env=environment, timeout=CHILD_S
    )
    if done.returncode == -signal.SIGILL:
        mend = "Install another release of torch: this one was built for a newer processor (docs/deploy.md)."
        yield Check("client", "error", "torch ends with an illegal instruction", mend)
        return
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield Check("client", "error", f"its process ends: {reason}", "pip install 'fedsplit[device]'")
        return
    resting = int(json.loads(done.stdout.splitlines()[-1]))
    yield Check("client", "ok", f"its process computes, and takes {resting / MIB:.0f} MiB before it has a model")
    yield _memory(asked, resting)


def _memory(asked: Asked, resting: int) -> Check:
    total, free = machine.memory_bytes()
    found = f"{free / MIB:.0f} MiB free of {total / MIB:.0f} MiB"
    part = 0
    if asked.config is not None:
        known = _noted(asked)
        try:
            part = client_memory_bytes(asked.config) if known is None else known
        except FedsplitError as error:
            return Check("memory", "warning", f"{found}; what the config needs is not known: {error}", _BUNDLE)
        found += f"; a client of the config takes {resting / MIB:.0f} + {part / MIB:.0f} MiB"
    if free >= resting + part:
        return Check("memory", "ok", found)
    mend = "End other programs, or set a smaller local.batch-size, cut.front or model; swap helps, and is slow."
    return Check("memory", "error" if total < resting + part else "warning", found, mend)


_BUNDLE = "Give the config.toml of a bundle: its manifest says so."


def _noted(asked: Asked) -> int | None:
    """What the manifest beside the config says of its memory, as it was computed where the data is."""
    from fedsplit.deploy.manifest import read

    manifest: dict[str, Any] = (read(asked.folder) if asked.folder else None) or {}
    value = manifest.get("client_memory_bytes")
    return value if isinstance(value, int) else None


def _state(folder: Path) -> Iterator[Check]:
    """Whether what a device keeps comes safely onto its disk."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    mend = f"Make {folder} a folder that this user can write: sudo install -d -o USER -m 700 {folder}"
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix=".fedsplit-doctor.", dir=there) as scratch:
            first, second = Path(scratch) / "first", Path(scratch) / "second"
            with first.open("wb") as file:
                file.write(bytes(MIB))
                file.flush()
                os.fsync(file.fileno())
            first.rename(second)
            handle = os.open(scratch, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except OSError as error:
        yield Check("state", "error", f"{folder} cannot be written ({error.strerror})", mend)
        return
    free, seconds = shutil.disk_usage(there).free, time.perf_counter() - start
    found = f"{folder}, {free / MIB:.0f} MiB free; 1 MiB is on the disk after {seconds * 1000:.0f} ms"
    if free < 256 * MIB:
        yield Check("state", "warning", found, "Free 256 MiB: personal layers and kept outputs go there.")
    else:
        yield Check("state", "ok", found)


def _clock(authority: Path | None) -> Iterator[Check]:
    """A device without a clock of its own starts in the past, where no certificate is valid yet."""
    now = time.time()
    first, last = Path(fedsplit.__file__).stat().st_mtime, float("inf")
    if authority is not None:
        try:
            first, last = _validity(authority)
        except (OSError, ValueError) as error:
            yield Check("clock", "error", f"{authority} is no certificate ({error})", "Copy ca.crt from the server.")
            return
    found = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    if now < first or now > last:
        which = "before it was installed" if authority is None else f"outside the validity of {authority.name}"
        mend = "Set the clock: sudo timedatectl set-ntp true, or sudo date -s '2026-01-31 12:00'."
        yield Check("clock", "error", f"{found}, {which}", mend if now < first else "Make new certificates.")
        return
    yield Check("clock", "ok", f"{found}, {'synchronised' if SYNCHRONISED.exists() else 'not seen to be synchronised'}")


def _validity(authority: Path) -> tuple[float, float]:
    """The first and the last second (since 1970) of the validity of a certificate."""
    from cryptography import x509

    certificate = x509.load_pem_x509_certificate(authority.read_bytes())
    return certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()


def _superlink(address: str, authority: Path | None) -> Check:
    """Whether the server answers, and proves that it is the one whose certificate we were given."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        with socket.create_connection((host, int(port)), timeout=WAIT_S) as link:
            if authority is None:
                return Check(address, "ok", "answers; give --root-certificates to check who it is")
            context = ssl.create_default_context(cafile=str(authority))
            with context.wrap_socket(link, server_hostname=host) as secure:
                ends = (secure.getpeercert() or {}).get("notAfter", "")
                return Check(address, "ok", f"answers, {secure.version()}, certificate valid until {ends}")
    except ssl.SSLCertVerificationError as error:
        mend = "Take the ca.crt and the host name that `fedsplit certify` was given on the server, and check the clock."
        return Check(address, "error", f"is not trusted: {error.verify_message}", mend)
    except ssl.SSLError as error:
        mend = "Start the SuperLink with --ssl-ca-certfile, --ssl-certfile and --ssl-keyfile."
        return Check(address, "error", f"speaks no TLS ({error.reason or error})", mend)
    except socket.gaierror as error:
        return Check(address, "error", f"is no known name ({error.strerror})", "Mend the name, or use the address.")
    except (OSError, ValueError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        mend = "Start the SuperLink with --host 0.0.0.0, and open its port in every firewall between."
        return Check(address, "error", f"cannot be reached ({why})", mend)
