"""The session outlives its connection: nothing is computed twice, nothing is lost."""

from __future__ import annotations

import threading

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from peers import network, site, until

from fedsplit.runtime.stream.packet import Kind
from fedsplit.types import FedsplitError


@pytest.mark.parametrize("after", [300, 2_000, 400_000, 1_200_000, 1_700_000])
def test_a_connection_cut_after_some_bytes_is_made_again(after: int) -> None:
    """In the greeting, in a packet on its way up, and in its reply."""
    with site() as here, network(here.port) as between:
        key = Ed25519PrivateKey.generate()
        ticket = here.ticket(key)
        here.expect(ticket)
        between.cut_after = [after, after]
        client = here.client(ticket, key, port=between.port)
        payload = bytes(range(256)) * 4000
        for step in range(3):
            assert client.exchange(Kind.FORWARD, step, payload) == (step + 1, payload)
        client.done()
        assert between.connections == 3
        assert here.handlers[0].values == [0, 1, 2] and len(here.handlers) == 1
        assert here.server.finished(ticket.token) is here.handlers[0]


def test_a_reply_that_was_computed_while_nobody_listened_is_kept() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def trouble(payload: bytes) -> None:
        begun.set()
        assert go_on.wait(20)

    with site() as here, network(here.port) as between:
        key = Ed25519PrivateKey.generate()
        ticket = here.ticket(key)
        here.expect(ticket, trouble)
        client = here.client(ticket, key, port=between.port)
        got: list[tuple[int, bytes]] = []
        device = threading.Thread(target=lambda: got.append(client.exchange(Kind.LEARN, 7, b"x")))
        device.start()
        assert begun.wait(20)
        between.drop()
        # The second connection waits for what the first one asked.
        assert until(lambda: between.connections == 2)
        go_on.set()
        device.join(20)
        assert got == [(8, b"x")] and here.handlers[0].values == [7]


def test_a_new_stream_replaces_the_old_one() -> None:
    with site() as here:
        key = Ed25519PrivateKey.generate()
        ticket = here.ticket(key)
        here.expect(ticket)
        first, second = here.client(ticket, key), here.client(ticket, key)
        assert first.exchange(Kind.FORWARD, 0, b"x") == (1, b"x")
        # Another process of the same node that sends the same gets the same; what differs is refused.
        assert second.exchange(Kind.FORWARD, 0, b"x") == (1, b"x")
        assert until(lambda: len(here.server._streams) == 1)
        assert second.exchange(Kind.FORWARD, 1, b"y") == (2, b"y")
        assert here.handlers[0].values == [0, 1]
        with pytest.raises(FedsplitError, match="not the same"):
            first.exchange(Kind.FORWARD, 5, b"z")


def test_patience_ends() -> None:
    with site() as here, network(here.port) as between:
        key = Ed25519PrivateKey.generate()
        ticket = here.ticket(key)
        here.expect(ticket)
        client = here.client(ticket, key, port=between.port, patience_s=1.0)
        client.exchange(Kind.FORWARD, 0, b"x")
        between.close()
        with pytest.raises(FedsplitError, match=r"No connection to 127\.0\.0\.1:\d+ within 1 s"):
            client.exchange(Kind.FORWARD, 0, b"x")
    assert here.handlers[0].closed == 1


def test_done_may_be_said_again_after_it_was_fetched() -> None:
    with site() as here:
        key = Ed25519PrivateKey.generate()
        ticket = here.ticket(key)
        here.expect(ticket)
        here.client(ticket, key).done()
        assert here.server.finished(ticket.token) is here.handlers[0]
        here.client(ticket, key).done()  # as after a connection that was cut before the acknowledgement
        assert here.server.finished(ticket.token) is None and here.handlers[0].closed == 0
