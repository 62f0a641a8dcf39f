"""The exposure ledger: what left the devices, of how many samples, how often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedsplit.audit.scene import Scene
from fedsplit.world import World


def by_device(built: World, clients: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """A row per device from the rows of clients.csv: samples, rounds, and how often a sample of its went up.

    `uploads_per_sample` is a mean over the device's samples; a selector sends some more often than others.
    """
    rows: list[dict[str, Any]] = []
    for device, shard in enumerate(built.shards):
        mine = [row for row in clients if row["client"] == str(device) and not row["failure"]]
        size, epochs = built.config.local.batch_size, built.config.local.epochs
        uploads = sum(min(int(row["kept_samples"]) * epochs, int(row["steps"]) * size) for row in mine)
        rows.append(
            {
                "client": device,
                "samples": len(shard),
                "rounds": len(mine),
                "uploads": uploads,
                "uploads_per_sample": uploads / len(shard),
                "bytes_up": sum(int(row["bytes_activations_up"]) + int(row["bytes_gradients_up"]) for row in mine),
            }
        )
    return rows


def summary(found: Scene, devices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What one upload of a sample shows the server, and over the run how many there were."""
    taken = [float(row["uploads_per_sample"]) for row in devices if row["rounds"]]
    return {
        "tensors": found.shapes,
        "bytes_per_upload": {name: round(size, 1) for name, size in found.sample_bytes.items()},
        "labels_sent": found.transcript.labels is not None,
        "devices_seen": len(taken),
        "devices": len(devices),
        "uploads_per_sample_mean": sum(taken) / len(taken) if taken else None,
        "uploads_per_sample_most": max(taken, default=None),
        "rounds_most": max((int(row["rounds"]) for row in devices), default=None),
    }
