"""What the server knows of its devices when a round begins: what controllers choose by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class Device(Protocol):
    """The time model of one device: rates in FLOP/s and bytes/s, as seconds; infinite rates give 0."""

    @property
    def name(self) -> str:
        """Its kind."""
        ...

    @property
    def latency_s(self) -> float:
        """Seconds that every message adds."""
        ...

    def train_s(self, flops: float) -> float:
        """Seconds of `flops` in training steps."""
        ...

    def download_s(self, count_bytes: float) -> float:
        """Seconds to receive so many bytes."""
        ...

    def upload_s(self, count_bytes: float) -> float:
        """Seconds to send so many bytes."""
        ...


@dataclass(frozen=True)
class Load:
    """What a client's round moves and computes, coded as the controllers named so far chose.

    `fixed_flops` come before the split steps; of one sample of a step, `sample_` says what it costs the device,
    `server_s` how long it takes the server. A step exchanges `messages` besides.
    """

    down_bytes: int
    up_bytes: int
    fixed_flops: float
    sample_flops: float
    sample_down_bytes: float
    sample_up_bytes: float
    server_s: float
    messages: int


@dataclass(frozen=True)
class Facts:
    """A round before it begins.

    `clients` are those sampled for it, ascending. By device: `samples`, its number of them; `last`, the last
    round whose update was let in, 0 if there was none; `labels`, how many of each class it says it has, which it
    says once: they are empty unless the controller has `reveal`, and in all but its first proposal. `steps` is
    `local.max-steps`. `devices`, by device, and `loads`, of `clients`, are there for a controller that is `timed`;
    one that is `placed` has the devices alone.
    """

    round: int
    clients: tuple[int, ...]
    samples: tuple[int, ...]
    last: tuple[int, ...]
    steps: int
    labels: tuple[tuple[float, ...], ...] = ()
    devices: Sequence[Device] = ()
    loads: Mapping[int, Load] = field(default_factory=dict)

    def transfer_s(self, client: int) -> float:
        """Seconds in which the client receives the model and sends its update."""
        device, load = self.devices[client], self.loads[client]
        return device.download_s(load.down_bytes) + device.upload_s(load.up_bytes) + 2 * device.latency_s

    def overhead_s(self, client: int) -> float:
        """Seconds of its work that do not grow with the batch: the local phase, and the latency of its steps."""
        device, load = self.devices[client], self.loads[client]
        return device.train_s(load.fixed_flops) + self.steps * load.messages * device.latency_s

    def sample_s(self, client: int) -> float:
        """Seconds that one more sample adds to a step: at the device, on the wire both ways, and at the server."""
        device, load = self.devices[client], self.loads[client]
        wire = device.download_s(load.sample_down_bytes) + device.upload_s(load.sample_up_bytes)
        return device.train_s(load.sample_flops) + wire + load.server_s
