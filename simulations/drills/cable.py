"""A cable between two network devices of this machine, with a rate, a delay and losses, for kernels without netem.

    python cable.py NAME_A NAME_B --rates A_TO_B B_TO_A [--delay-s 0.02] [--loss 0.01] [--seed 0]

makes two TUN devices; IP packets that leave one arrive at the other. Each direction has a transmitter of so many bytes
a second with room for 1,000 packets, as netem's, and then the delay; a packet is lost with the probability `--loss`.
Rates of 0 are infinite. It says "ready" once the devices are there, and ends, taking them along, when its input does.
Packets of TCP are real and go through the kernel, with its slow start and its retransmissions.
"""

from __future__ import annotations

import argparse
import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MOST_BYTES = 65536
ROOM = 1000  # netem's default limit


@dataclass
class Direction:
    """One way through the cable, from the file `source` to the file `target`: what is on its way, soonest first."""

    source: int
    target: int
    bytes_per_s: float
    delay_s: float
    loss: float
    draws: random.Random
    free_s: float = 0.0
    waiting: list[tuple[float, int, bytes]] = field(default_factory=list)
    number: int = 0

    def take(self, now_s: float) -> None:
        """Read what has come."""
        with suppress(BlockingIOError):
            while True:
                packet = os.read(self.source, MOST_BYTES)
                if self.draws.random() < self.loss or len(self.waiting) >= ROOM:
                    continue
                sending_s = len(packet) / self.bytes_per_s if self.bytes_per_s else 0.0
                self.free_s = max(self.free_s, now_s) + sending_s
                self.number += 1
                heapq.heappush(self.waiting, (self.free_s + self.delay_s, self.number, packet))

    def deliver(self, now_s: float) -> float:
        """Hand over what is due; when the next packet will be."""
        while self.waiting and self.waiting[0][0] <= now_s:
            with suppress(OSError):  # the other end is down
                os.write(self.target, heapq.heappop(self.waiting)[2])
        return self.waiting[0][0] if self.waiting else now_s + 3600.0


def plug(name: str) -> int:
    """A new TUN device; it is gone when the file is closed.

    Raises:
        OSError: this machine or this user may not have one.
    """
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
    except OSError:
        os.close(file)
        raise
    return file


def carry(directions: Sequence[Direction]) -> None:
    """Carry packets until standard input ends."""
    sources = {way.source: way for way in directions}
    next_s = time.monotonic()
    while True:
        wait_s = max(0.0, next_s - time.monotonic())
        ready = select.select([*sources, sys.stdin], [], [], wait_s)[0]
        if sys.stdin in ready and not sys.stdin.read(1):
            return
        now_s = time.monotonic()
        for source in ready:
            if source in sources:
                sources[source].take(now_s)
        next_s = min(way.deliver(now_s) for way in directions)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs=2, help="names of the two devices")
    parser.add_argument("--rates", nargs=2, type=float, default=(0.0, 0.0), help="bytes a second, there and back")
    parser.add_argument("--delay-s", type=float, default=0.0, help="seconds that each packet takes beside")
    parser.add_argument("--loss", type=float, default=0.0, help="fraction of the packets that are lost")
    parser.add_argument("--seed", type=int, default=0, help="decides which")
    asked = parser.parse_args()
    with suppress(OSError):
        os.nice(-15)  # it must wake in time where the processors are busy
    a, b = map(plug, asked.names)
    ways = (
        Direction(a, b, asked.rates[0], asked.delay_s, asked.loss, random.Random(2 * asked.seed)),
        Direction(b, a, asked.rates[1], asked.delay_s, asked.loss, random.Random(2 * asked.seed + 1)),
    )
    print("ready", flush=True)
    carry(ways)


if __name__ == "__main__":
    main()
