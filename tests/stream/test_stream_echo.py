"""Packets cross real sockets and come back: sizes, TLS, several sessions, the end."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from peers import LIMITS, Echo, certificates, site, until

from fedsplit.runtime.stream.packet import HEADER_BYTES, JOIN_BYTES, Kind
from fedsplit.runtime.stream.server import StreamServer
from fedsplit.types import FedsplitError

SIZES = (0, 1, 4096, JOIN_BYTES - HEADER_BYTES, JOIN_BYTES, 3_000_000, 10_000_000, 10_000_001)


@pytest.mark.parametrize("secure", [False, True], ids=["plaintext", "tls"])
def test_what_goes_up_comes_down(secure: bool) -> None:
    with site(tls=certificates() if secure else None) as here:
        client, ticket = here.join()
        for number, size in enumerate(SIZES):
            payload = os.urandom(size)
            value = 2**64 - 1 if number == 0 else number
            assert client.exchange(Kind.FORWARD, value, payload) == ((value + 1) % 2**64, payload)
        assert here.server.finished(ticket.token) is None
        client.done()
        handler = here.server.finished(ticket.token)
        assert handler is here.handlers[0] and handler.values[1:] == [*range(1, len(SIZES))]
        assert here.server.finished(ticket.token) is None
        with pytest.raises(FedsplitError, match="done"):
            client.exchange(Kind.FORWARD, 0, b"")
    assert handler.closed == 0  # who fetched it keeps it


def test_sessions_interleave_and_one_thread_computes() -> None:
    together = threading.Barrier(5)

    def work(number: int) -> bool:
        client, _ = clients[number]
        same = True
        for step in range(8):
            together.wait(timeout=20)
            payload = bytes([number]) * (100_000 + step)
            same &= client.exchange(Kind.FORWARD, step, payload) == (step + 1, payload)
        client.done()
        return same

    with site() as here:
        clients = [here.join() for _ in range(5)]
        with ThreadPoolExecutor(5) as pool:
            assert all(pool.map(work, range(5)))
        assert all(one.values == list(range(8)) for one in here.handlers)
        threads = set.union(*(one.threads for one in here.handlers))
        assert len(here.handlers) == 5 and len(threads) == 1 and threading.get_ident() not in threads
        rows = here.server.sessions()
        assert [row.state for row in rows] == ["done"] * 5
        assert all(row.packets == 9 and row.up_bytes > 800_000 < row.down_bytes for row in rows)
        assert (rows[0].node, rows[0].client, rows[0].round, rows[0].last_error) == (1, 2, 3, "")


def test_a_handler_is_closed_once_and_only_if_nobody_fetched_it() -> None:
    with site() as here:
        left, fetched, dismissed, stopped = (here.join() for _ in range(4))
        for client, _ in (left, fetched, dismissed, stopped):
            client.exchange(Kind.LEARN, 0, b"x")
        left[0].done()
        fetched[0].done()
        assert here.server.finished(fetched[1].token) is here.handlers[1]
        here.server.dismiss(dismissed[1].token)
        here.server.dismiss(dismissed[1].token)
        assert until(lambda: here.handlers[2].closed == 1)
        with pytest.raises(FedsplitError, match="refused"):
            dismissed[0].exchange(Kind.LEARN, 0, b"x")
        here.server.dismiss(b"unknown")
    assert [one.closed for one in here.handlers] == [1, 0, 1, 1]


def test_a_session_that_never_worked_makes_no_handler() -> None:
    with site() as here:
        here.join()
    assert here.handlers == []


def test_an_address_that_is_taken_and_certificates_that_are_none() -> None:
    with site() as here, pytest.raises(FedsplitError, match="taken"):
        StreamServer(f"127.0.0.1:{here.port}", LIMITS, None).start()
    _, chain, key = certificates()
    with pytest.raises(FedsplitError, match="not readable"):
        StreamServer("127.0.0.1:0", LIMITS, (b"nonsense", key)).start()
    with pytest.raises(FedsplitError, match="does not belong"):
        StreamServer("127.0.0.1:0", LIMITS, (chain, certificates()[2])).start()


def test_echo_is_a_handler() -> None:
    from fedsplit.runtime.stream.session import Handler

    handler: Handler = Echo()
    assert handler.handle(Kind.LEARN, 1, b"a") == (2, b"a")
