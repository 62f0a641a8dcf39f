"""Faults among the live processes of a deployment on this machine."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from drills.cutter import Cutter
from fedsplit.runtime.localnet import LocalNet
from fedsplit.types import Scalar

VICTIM = 1
"""The client, and the SuperNode, that things happen to."""
LIVE: dict[str, Scalar] = {
    "data.limit": 400,
    "data.test-limit": 40,
    "data.partition": "iid",
    "devices.count": 2,
    "rounds": 3,
    "local.batch-size": 8,
    "model.dropout": 0.1,
    "share.quorum": 0.0,
    "wire.parameters-up": "delta,feedback,topk",  # the devices have something to keep
    "link.idle-s": 20.0,
    "engine.timeout-s": 300.0,  # a busy machine takes long to start its processes
}

Fault = Callable[[LocalNet, dict[str, Scalar]], str]


def client_killed(net: LocalNet, values: dict[str, Scalar]) -> str:
    """Kill -9 of a ClientApp in the middle of its steps; the id of the run."""
    run = net.submit(values)
    _in_session(net, values).kill()
    return _completed(net, run)


def network_cut(net: LocalNet, values: dict[str, Scalar]) -> str:
    """Connections to the body are cut, again and again, and can be made anew at once."""
    cutter = Cutter(str(values["link.listen"]), [300_000, 900_000, 2_000_000, 500_000])
    try:
        run = _completed(net, net.submit({**values, "link.address": cutter.address}))
    finally:
        cutter.close()
    if not cutter.cuts:
        raise RuntimeError("no connection was cut")
    return run


def supernode_killed(net: LocalNet, values: dict[str, Scalar]) -> str:
    """Kill -9 of a SuperNode with its ClientApp; it is started again, as systemd would, until it stays."""
    run = net.submit(values)
    _in_session(net, values)
    net.kill(f"node-{VICTIM}")

    def supervise() -> None:
        process = net.processes.get(f"node-{VICTIM}")
        if process is None or process.poll() is not None:
            net.start_node(VICTIM)

    return _completed(net, run, supervise)


def serverapp_killed(net: LocalNet, values: dict[str, Scalar]) -> str:
    """Kill -9 of the ServerApp in round 2; the run goes on from its folder."""
    run = net.submit(values)
    _in_round_2(net, values)
    for process in net.find("flwr-serverapp", "superlink"):
        process.kill()
    net.stop(run)
    return _completed(net, net.submit({**values, "resume": values["out"]}, "resumed"))


def superlink_killed(net: LocalNet, values: dict[str, Scalar]) -> str:
    """Kill -9 of the SuperLink and all below it in round 2; it is started again on its database, the run goes on."""
    run = net.submit(values)
    _in_round_2(net, values)
    net.kill("superlink")
    net.start_superlink()
    net.stop(run)
    return _completed(net, net.submit({**values, "resume": values["out"]}, "resumed"))


def straggler(net: LocalNet, values: dict[str, Scalar]) -> str:
    """A client that hangs for ever in round 1."""
    return _completed(net, net.submit({**values, "engine.timeout-s": 60.0, "engine.faults": f"hang:{VICTIM}@1"}))


FAULTS: dict[str, Fault] = {
    "client killed in mid-step": client_killed,
    "network cut in mid-step": network_cut,
    "SuperNode killed, started again": supernode_killed,
    "ServerApp killed, run resumed": serverapp_killed,
    "SuperLink killed, started again, run resumed": superlink_killed,
    "straggler past the deadline": straggler,
}


def _completed(net: LocalNet, run: str, watch: Callable[[], None] = lambda: None) -> str:
    status = net.wait(run, 580.0, watch)
    if status != "finished:completed":
        raise RuntimeError(f"the run ended as '{status}': {net.run_log(run)[-800:]}")
    return run


def _in_session(net: LocalNet, values: dict[str, Scalar]) -> psutil.Process:
    """The victim's ClientApp, as soon as it has been connected to the body for a moment."""
    port = int(str(values["link.listen"]).rpartition(":")[2])
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        for process in net.find("flwr-clientapp", f"node-{VICTIM}"):
            with suppress(psutil.Error):
                if any(one.raddr and one.raddr[1] == port for one in process.net_connections("tcp")):
                    time.sleep(0.5)
                    return process
        time.sleep(0.1)
    raise RuntimeError("the client never reached the body")


def _in_round_2(net: LocalNet, values: dict[str, Scalar]) -> None:
    rounds = Path(str(values["out"])) / "rounds.csv"
    deadline = time.monotonic() + 200
    while not rounds.exists():
        if time.monotonic() > deadline:
            raise RuntimeError("round 1 never ended")
        time.sleep(0.1)
    _in_session(net, values)


def free_address() -> str:
    """An address of this host that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
