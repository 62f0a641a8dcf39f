"""What this machine gives a run: cores, memory, disk, GPUs, and what Flower and Ray will meet."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedsplit.doctor.check import Check, Level

if TYPE_CHECKING:
    from torch import Tensor

GIB = 2**30
SUPERLINK_PORT = "39091"


def processor() -> Iterator[Check]:
    """Cores, and the threads that torch would take."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    omp = os.environ.get("OMP_NUM_THREADS", "unset")
    yield Check("processor", "ok", f"{cores} cores, {torch.get_num_threads()} torch threads (OMP_NUM_THREADS {omp})")


def memory() -> Iterator[Check]:
    """Free memory, against what a simulation on Ray takes."""
    total, free = memory_bytes()
    found = f"{free / GIB:.1f} GiB free of {total / GIB:.1f} GiB"
    if free < 4 * GIB:
        yield Check("memory", "warning", found, "Use one worker, smaller batches or a smaller model.")
    else:
        yield Check("memory", "ok", found)


def shared_memory() -> Iterator[Check]:
    """Where Ray keeps the messages between its processes."""
    place = Path("/dev/shm")
    if not place.exists():
        return  # other systems share memory through files
    free = shutil.disk_usage(place).free
    if free < GIB:
        mend = "In a container, start it with --shm-size=2g; until then Ray uses its temporary folder, which is slower."
        yield Check("shared memory", "warning", f"{free / GIB:.2f} GiB free in {place}", mend)
    else:
        yield Check("shared memory", "ok", f"{free / GIB:.1f} GiB free in {place}")


def disk() -> Iterator[Check]:
    """The folders that a run writes to."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedsplit"
    temporary = Path(tempfile.gettempdir())
    yield _folder("run folders", Path("runs").absolute(), "error", "name another folder with --out.")
    yield _folder("cache", cache, "warning", "set data.cache; until then every run decodes its data anew.")
    yield _folder("home", Path.home(), "warning", "set FLWR_HOME, and out, before `flwr run`.")
    yield _folder("temporary files", temporary, "error", "set TMPDIR to a folder that can be written.")


def cuda() -> Iterator[Check]:
    """The GPUs that torch sees."""
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        yield Check("CUDA", "ok", f"{torch.version.cuda}: {names}")
    elif Path("/proc/driver/nvidia/version").exists():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
        mend = "Install a torch built for the driver's CUDA; until then runs use the CPU."
        yield Check("CUDA", "warning", f"a driver, but this torch, built for {built}, sees no GPU", mend)
    else:
        yield Check("CUDA", "ok", "no GPU visible; runs use the CPU")


def determinism() -> Iterator[Check]:
    """The same small step twice, on one thread, must give the same bits."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        same = torch.equal(small_step(), small_step())
    finally:
        torch.set_num_threads(threads)
    if same:
        yield Check("determinism", "ok", "the same step twice gives the same bits")
    else:
        yield Check(
            "determinism", "error", "the same step twice differs", "Reinstall torch; no result can be repeated."
        )


def flower() -> Iterator[Check]:
    """A SuperLink that `flwr run` left behind serves later runs with the environment of its start."""
    port = int(os.environ.get("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", SUPERLINK_PORT))
    with socket.socket() as probe:
        probe.settimeout(0.5)
        running = probe.connect_ex(("127.0.0.1", port)) == 0
    if running:
        mend = (
            "Its environment variables, folder and packages are those of its start: after changing any of them, stop "
            "it, or set FLWR_LOCAL_SUPERLINK_HTTP_API_PORT and FLWR_LOCAL_CONTROL_API_PORT to free ports."
        )
        yield Check("Flower SuperLink", "warning", f"one already listens on port {port}", mend)
    else:
        yield Check("Flower SuperLink", "ok", f"port {port} is free; `flwr run` starts one there")


def ray() -> Iterator[Check]:
    """Ray's executable, the folder of its sessions, and half of its dashboard, with which 2.55 does not start."""
    spec = importlib.util.find_spec("ray")
    if spec is None or spec.origin is None:
        return  # the packages' checks say so
    raylet = Path(spec.origin).parent / "core" / "src" / "ray" / "raylet" / "raylet"
    if sys.platform == "linux" and not os.access(raylet, os.X_OK):
        yield Check("Ray", "error", "its raylet is missing or not executable", "pip install --force-reinstall ray")
    if importlib.util.find_spec("prometheus_client") and not importlib.util.find_spec("opencensus"):
        said = "prometheus_client is installed (JupyterLab brings it) without the rest of Ray's dashboard: it times out"
        yield Check("Ray", "error", said, "pip uninstall prometheus_client, or pip install 'ray[default]'.")
    sessions = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray"
    yield _folder("Ray's sessions", sessions, "error", "set RAY_TMPDIR to a short path that can be written.")


def small_step() -> Tensor:
    """A gradient (96, 96), from the same numbers every time."""
    import torch

    stream = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 96, generator=stream), torch.randn(96, 96, generator=stream).requires_grad_()
    loss = torch.nn.functional.gelu(x @ weight).softmax(-1).square().sum()
    return torch.autograd.grad(loss, weight)[0]


def memory_bytes() -> tuple[int, int]:
    """Total and free bytes; of the container, where it has a limit of its own."""
    total = free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        kib = {line.split(":")[0]: int(line.split()[1]) for line in meminfo.read_text().splitlines()}
        free = kib["MemAvailable"] * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such group, or its limit is "max"
        return total, free
    return min(total, limit), max(0, min(free, limit - used))


def _folder(name: str, folder: Path, level: Level, mend: str) -> Check:
    """Whether a folder, or the nearest existing one above it, takes a file; it makes no folder."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"fedsplit")
    except OSError as error:
        return Check(name, level, f"{folder} cannot be written ({error.strerror})", mend[0].upper() + mend[1:])
    free = shutil.disk_usage(there).free
    if free < GIB:
        return Check(name, "warning", f"{folder}, only {free / GIB:.1f} GiB free", f"Free 1 GiB, or {mend}")
    return Check(name, "ok", f"{folder}, {free / GIB:.0f} GiB free")
