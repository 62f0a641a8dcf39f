"""Clients of a simulation that break under `flwr run`, in a file of its own, so that two workers share such runs."""

from __future__ import annotations

import socket
import threading
from contextlib import closing, suppress
from pathlib import Path

import pytest
from probed import ENV, PROBE

from fedsplit.runtime.superlink import flwr_run
from fedsplit.types import FedsplitError, Scalar

USERS_PORT = 39091


def outcomes(log: list[str], number: int) -> dict[int, str]:
    """The probe's results of one round, by client."""
    lines = [line.split(maxsplit=3) for line in log if line.startswith(f"RESULT {number} ")]
    return {int(client): outcome for _, _, client, outcome in lines}


@pytest.mark.slow
def test_clients_that_die_hang_and_raise_and_a_server_that_fails(workplace: Path) -> None:
    """One run, several promises: other folder, port 39091 taken, two actors, one killed, one hung, then an error."""
    asked: list[bytes] = []
    log: list[str] = []
    config: dict[str, Scalar] = {"engine.faults": "kill:1@1, hang:2@2, raise:0@2, large:3@1", "timeout-s": 45.0}
    with closing(socket.socket()) as users:
        beside = _bound(users)
        if beside:
            users.listen()
            threading.Thread(target=_note_requests, args=(users, asked), daemon=True).start()
        with pytest.raises(FedsplitError, match="finished:failed") as ended:
            options = {"nodes": 3, "cpus_per_client": 1, "ray_cpus": 2}
            flwr_run(PROBE, {**config, "fail": True}, **options, env=ENV, cwd=workplace, echo=log.append)
        if beside:
            with socket.create_connection(("127.0.0.1", USERS_PORT)) as control:
                control.sendall(b"control")
                control.recv(1)
    assert f"NODES 3 CWD {workplace}" in log
    [home] = {word.lstrip("'\"").partition("/apps/")[0] for line in log for word in line.split() if "/apps/" in word}
    assert Path(home).is_absolute() and not Path(home).exists()
    assert outcomes(log, 1) == {0: "ok", 1: "its process died (ActorDiedError)", 2: "ok", 3: "changed"}
    assert outcomes(log, 2) == {
        0: "RuntimeError: injected fault 'raise' in client 0, round 2",
        1: "ok",
        2: "no reply within 45 s",
        3: "ok",
    }
    assert outcomes(log, 3) == dict.fromkeys(range(4), "ok")
    assert "FedsplitError: the probe was told to fail" in str(ended.value)
    if not beside:
        pytest.skip(f"port {USERS_PORT} is in use by a SuperLink that this test must not touch; all else held")
    assert asked == [b"control"]


def _bound(users: socket.socket) -> bool:
    """Whether the port of a user's own SuperLink was free."""
    users.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with suppress(OSError):
        users.bind(("127.0.0.1", USERS_PORT))
        return True
    return False


def _note_requests(users: socket.socket, asked: list[bytes]) -> None:
    """What callers say; one that says nothing only looks whether the port is free."""
    with suppress(OSError):
        while True:
            caller, _ = users.accept()
            with caller, suppress(TimeoutError):
                caller.settimeout(1.0)
                if said := caller.recv(200):
                    asked.append(said)
