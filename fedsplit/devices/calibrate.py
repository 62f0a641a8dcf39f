"""What this machine does of a config's client part, measured, as a profile for `devices.fleet`."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from fedsplit.client import client_share
from fedsplit.config import Config
from fedsplit.data.batches import to_batch
from fedsplit.devices.profiles import Profile
from fedsplit.doctor.machine import memory_bytes
from fedsplit.optim import PartOptimizer
from fedsplit.step import Client, local_step, u_shape_step, vanilla_step
from fedsplit.types import Batch, FedsplitError
from fedsplit.wire.link import Link
from fedsplit.world import World, world

WARM_UP = 3


@dataclass(frozen=True)
class Measured:
    """Median seconds of a step and of a forward pass of `samples` samples, of `repeats` each, and their rates."""

    samples: int
    repeats: int
    step_s: float
    forward_s: float
    train_flops_per_s: float
    infer_flops_per_s: float


@dataclass
class _Silence:
    """A server that takes no time: its answers are those of the first step, made before the clock runs."""

    world: World
    answers: dict[str, bytes] = field(default_factory=dict)

    def forward(self, activations: bytes, noise: int) -> bytes:
        """Activations down."""
        if "forward" not in self.answers:
            link = Link(self.world.codecs)
            with torch.no_grad():
                x = link.decode("activations-up", activations)["x"].to(self.world.device)
                self.answers["forward"] = link.encode("activations-down", {"x": self.world.parts.body(x, noise)})
            back = {"x": torch.zeros_like(x[:, self.world.open])}
            self.answers["backward"] = link.encode("gradients-down", back) if self.world.trains.front else b""
        return self.answers["forward"]

    def backward(self, gradients: bytes) -> bytes:
        """The gradient at the cut, if the front waits for one."""
        return self.answers["backward"]

    def learn(self, activations: bytes, noise: int) -> tuple[bytes, float]:
        """Gradient and loss of a vanilla split."""
        self.forward(activations, noise)
        return self.answers["backward"], 0.0


def measure(config: Config, repeats: int = 20, clock: Callable[[], float] = time.perf_counter) -> Measured:
    """Time the client's part of a few training steps of `config`, and forward passes of front and tail.

    A step has all that a device does in it: batch, front, tail, loss, optimiser, frames; the server answers at
    once. Front outputs are not kept. A frozen front is charged at the rate of the forward passes. `clock` may be
    `time.process_time` where other processes disturb.

    Raises:
        FedsplitError: whatever is wrong with the config, or a client's part without compute.
    """
    built = world(config.replace(front__cache=False, data__select="", body__plans=""))
    count = config.local.batch_size
    indices = np.arange(count) % len(built.data.train)
    link = Link(built.codecs)
    settings, named = config.optimizer, built.client
    optimizer = PartOptimizer(named, settings, built.learning_rate(1), config.pieces("share.proximal"))
    trains = built.trains
    client = Client(
        built.parts.front, built.parts.tail, link, optimizer, bool(trains.front), bool(trains.body),
        config.pieces("front.penalties"), built.start, built.open,
    )  # fmt: skip
    server = _Silence(built)

    def batch() -> Batch:
        return to_batch(built.data.train, indices, kind=config.data.augment, stream=0, **built.look)

    def step() -> None:
        if config.cut.shape == "none":
            local_step(client, batch(), 0)
        else:
            (vanilla_step if config.cut.shape == "vanilla" else u_shape_step)(client, server, batch(), 0)

    def look() -> None:
        with torch.inference_mode():
            built.short(built.parts.front(batch().x, start=built.start))

    step_s = _median_s(step, repeats, built.device, clock)
    built.train(False)
    forward_s = _median_s(look, repeats, built.device, clock)
    built.train(True)
    built.load(built.initial)
    return _rates(built, count, repeats, step_s, forward_s)


def _rates(built: World, count: int, repeats: int, step_s: float, forward_s: float) -> Measured:
    whole = client_share(built)[0] * count
    if not whole or not built.flops.score:
        raise FedsplitError("The client's part of this config computes nothing; calibrate one with cut.front above 0.")
    infer = built.flops.score * count / forward_s
    frozen = 0 if built.trains.front else built.flops.front * count
    left_s = step_s - frozen / infer
    # Where nearly all of a step is the frozen front, what is left is noise: one rate for the whole then.
    train = (whole - frozen) / left_s if left_s > step_s / 10 and whole > frozen else whole / step_s
    return Measured(count, repeats, step_s, forward_s, train, infer)


def _median_s(work: Callable[[], None], repeats: int, device: torch.device, clock: Callable[[], float]) -> float:
    found = []
    for number in range(WARM_UP + repeats):
        begun = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= WARM_UP:
            found.append(clock() - begun)
    return statistics.median(found)


def profile_of(config: Config, found: Measured, name: str) -> tuple[Profile, str]:
    """The profile of this machine, and the text of its file; link and power are those of the config's `devices.*`."""
    devices = config.devices
    how = f"median of {found.repeats} {{}} of {found.samples} samples, {config.model.name}, {config.threads} threads"
    train, infer = how.format("training steps"), how.format("forward passes")
    disk = shutil.disk_usage(Path.cwd()).free
    said = "not measured: devices.{} of the config"
    rows: dict[str, tuple[float, str]] = {
        "train_fp32_flops_per_s": (float(f"{found.train_flops_per_s:.4g}"), train),
        "train_fp16_flops_per_s": (float(f"{found.train_flops_per_s:.4g}"), "not measured: as fp32"),
        "infer_fp32_flops_per_s": (float(f"{found.infer_flops_per_s:.4g}"), infer),
        "infer_fp16_flops_per_s": (float(f"{found.infer_flops_per_s:.4g}"), "not measured: as fp32"),
        "memory_bytes": (memory_bytes()[0], "this machine's (or its container's) whole memory"),
        "storage_bytes": (disk, "free on the disk of the folder in which it was measured"),
        "down_bytes_per_s": (devices.down_bytes_per_s, said.format("down-bytes-per-s")),
        "up_bytes_per_s": (devices.up_bytes_per_s, said.format("up-bytes-per-s")),
        "latency_s": (devices.latency_s, said.format("latency-s")),
        "active_w": (devices.active_w, said.format("active-w")),
        "idle_w": (0.0, "not measured"),
    }
    assert set(rows) == {field.name for field in fields(Profile)} - {"name", "precision"}
    head = f"# Measured by fedsplit doctor --calibrate on {os.uname().sysname} {os.uname().machine}.\n"
    lines = [f"{key.replace('_', '-')} = {value!r} # {source}" for key, (value, source) in rows.items()]
    figures = {key: value for key, (value, _) in rows.items()}
    return Profile(name, **figures), head + "\n".join(lines) + "\n"  # type: ignore[arg-type]
