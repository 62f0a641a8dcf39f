"""Predicted against measured seconds of a device's steps over links of several qualities, between network namespaces.

    python simulations/hosts.py [--quick] [--link DOWN,UP,LATENCY,LOSS ...] [--steps 6] [--batch-size 16]

For each link (megabits a second down and up, milliseconds a message, per cent of packets lost) a server and one device
in namespaces of their own train fedsplit_micro for one round over TLS. Measured are the seconds of the device's
exchanges less those in which the body computes; predicted is what the virtual clock makes of their bytes and messages
for a profile with the same bandwidth and latency. The clock knows no headers, handshake, slow start or loss. `after 1`
leaves out the first step, in which the session is opened. The first row's link is as fast as this machine: what is
measured there is what the software takes itself. Needs root. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drills.hosts import Quality, hosts, kinds

from fedsplit.types import Scalar

LINKS = ("0,0,0,0", "100,100,1,0", "50,10,10,0", "50,10,10,0.5", "20,5,30,0", "20,5,30,1", "4,1,100,0")
QUICK = ("0,0,0,0", "50,10,10,0.5")


def quality(text: str) -> Quality:
    """A link out of its four numbers."""
    down, up, latency, loss = map(float, text.split(","))
    return Quality(down * 1e6 / 8, up * 1e6 / 8, latency / 1e3, loss / 100)


def measure(kind: str, link: Quality, values: dict[str, Scalar]) -> dict[str, Any]:
    """A row: both sums of seconds, with and without the first step."""
    shape: dict[str, Scalar] = {
        "devices.down-bytes-per-s": link.down_bytes_per_s,
        "devices.up-bytes-per-s": link.up_bytes_per_s,
        "devices.latency-s": link.latency_s,
    }
    with tempfile.TemporaryDirectory() as folder, hosts(kind, [link]) as net:
        row = net.run({**values, **shape}, Path(folder))[0]
    exchanges, steps = row["exchanges_s"], row["steps"]
    later = sum(exchanges[len(exchanges) // steps :])
    foreseen = row["predicted_s"] * (steps - 1) / steps  # batches are alike
    return {
        **{name: row[name] for name in ("steps", "bytes", "messages", "predicted_s", "measured_s", "server_s")},
        "later_predicted_s": foreseen, "later_measured_s": later,
        "error": row["predicted_s"] / row["measured_s"] - 1, "later_error": foreseen / later - 1,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two links, three steps")
    parser.add_argument("--link", action="append", help="DOWN,UP,LATENCY,LOSS in Mbit/s, ms and per cent")
    parser.add_argument("--steps", type=int, default=6, help="steps of the round")
    parser.add_argument("--batch-size", type=int, default=16)
    asked = parser.parse_args(arguments)
    if asked.steps < 2:
        parser.error("--steps must be at least 2")
    lacking = kinds()
    kind = next((kind for kind, why in lacking.items() if not why), "")
    if not kind:
        print("; ".join(f"no {kind}: {why}" for kind, why in lacking.items()), file=sys.stderr)
        return 1
    steps = 3 if asked.quick else asked.steps
    values: dict[str, Scalar] = {
        "rounds": 1, "devices.per-round": 1, "data.partition": "iid", "data.limit": steps * asked.batch_size,
        "data.test-limit": 10, "data.allow-missing-classes": True, "local.batch-size": asked.batch_size,
    }  # fmt: skip
    rows = []
    print(f"links by {kind}\n  down   up Mbit/s  latency ms  loss %   predicted s  measured s    error  after 1")
    for text in asked.link or (QUICK if asked.quick else LINKS):
        row = measure(kind, quality(text), values)
        rows.append({"link": text, "kind": kind, **row})
        down, up, latency, loss = text.split(",")
        print(
            f"{down:>6}{up:>12}{latency:>12}{loss:>8}{row['predicted_s']:14.2f}{row['measured_s']:12.2f}"
            f"{100 * row['error']:+8.0f} %{100 * row['later_error']:+7.0f} %",
            flush=True,
        )
    print(json.dumps({"rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
