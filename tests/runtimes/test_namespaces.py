"""Invariant 7 between hosts: a server and two devices in network namespaces, over slow links that lose packets."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from alike import NANO, ROOT, assert_alike, in_process

from fedsplit.config import resolve
from fedsplit.types import Scalar

sys.path.append(str(ROOT / "simulations"))

from drills.cable import Direction
from drills.hosts import SERVER, Quality, hosts, inside, kinds

LINKS = [Quality(2.5e6, 1.25e6, 0.010, 0.005), Quality(2.5e6, 1.25e6, 0.010, 0.005)]
SMALL: dict[str, Scalar] = {
    **NANO,
    "data.partition": "iid",
    "devices.down-bytes-per-s": LINKS[0].down_bytes_per_s,
    "devices.up-bytes-per-s": LINKS[0].up_bytes_per_s,
    "devices.latency-s": LINKS[0].latency_s,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["netem", "cable"])
def test_over_slow_links_that_lose_packets_it_is_as_in_process(kind: str, tmp_path: Path) -> None:
    if why := kinds()[kind]:
        pytest.skip(f"no delay and loss by {kind}: {why}")
    in_process(resolve(SMALL), tmp_path / "here")
    with hosts(kind, LINKS) as net:
        rows = net.run(SMALL, tmp_path)
    assert_alike([tmp_path / "here", tmp_path / "run"])
    assert {(row["client"], row["round"]) for row in rows} == {(0, 1), (1, 1), (0, 2), (1, 2)}
    for row in rows:
        predicted, measured = row["predicted_s"], row["measured_s"]
        assert predicted > 0 and measured > 0
        print(
            f"client {row['client']}, round {row['round']}: predicted {predicted:.2f} s, measured {measured:.2f} s, "
            f"error {100 * (predicted / measured - 1):+.0f} %"
        )


def test_a_cable_has_a_rate_a_delay_and_room_for_so_many_packets() -> None:
    (inlet, source), (target, outlet) = (socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2))
    with inlet, source, target, outlet:
        source.setblocking(False)
        way = Direction(source.fileno(), target.fileno(), 1e4, 0.5, 0.0, random.Random(0))
        inlet.send(b"a" * 1000)
        inlet.send(b"b" * 500)
        way.take(2.0)
        assert [due_s for due_s, _, _ in way.waiting] == pytest.approx([2.6, 2.65])
        assert way.deliver(2.62) == pytest.approx(2.65) and outlet.recv(2000) == b"a" * 1000
        inlet.send(b"c" * 100)  # the transmitter has been idle since
        way.take(3.0)
        assert way.deliver(4.0) > 4.0 and outlet.recv(2000) == b"b" * 500 and outlet.recv(2000) == b"c" * 100
        way.loss = 1.0
        inlet.send(b"d")
        way.take(4.0)
        assert not way.waiting


def test_nothing_of_the_hosts_is_left_when_something_fails() -> None:
    if why := kinds()["cable"]:
        pytest.skip(why)

    def listed() -> str:
        spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        return spaces + subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout

    with pytest.raises(ZeroDivisionError), hosts("cable", LINKS[:1]) as net:
        assert net.server in listed()
        pinged = ["ping", "-c", "1", "-W", "5", SERVER] if shutil.which("ping") else ["true"]
        assert not subprocess.run([*inside(net.names[1]), *pinged], capture_output=True).returncode
        cable = net.processes[0]
        raise ZeroDivisionError
    assert cable.returncode is not None and f"fs{os.getpid()}" not in listed()
