"""What a server tells of its sessions while they live."""

from __future__ import annotations

import pytest
from peers import network, site, until

from fedsplit.runtime.stream.packet import Kind
from fedsplit.runtime.stream.session import Event
from fedsplit.types import FedsplitError


def broken(payload: bytes) -> None:
    """Trouble that a device may be told of."""
    if payload == b"bad":
        raise FedsplitError("A packet does not fit\nthe body.")


def test_events_follow_a_session_through_a_lost_connection() -> None:
    seen: list[Event] = []
    with site() as here, network(here.port) as between:
        here.server._on_event = seen.append
        key_client, ticket = here.join()
        client = here.client(ticket, key_client._key, between.port)
        client.exchange(Kind.FORWARD, 1, b"one")
        between.drop()
        assert until(lambda: seen[-1].what == "lost")
        client.exchange(Kind.FORWARD, 2, b"two")
        client.done()
        here.server.dismiss(ticket.token)
    assert [event.what for event in seen] == ["expected", "opened", "lost", "resumed", "done", "dismissed"]
    assert {(event.node, event.client, event.round) for event in seen} == {(1, 2, 3)}


def test_a_session_that_fails_is_dismissed_with_its_reason() -> None:
    seen: list[Event] = []
    with site() as here:
        here.server._on_event = seen.append
        client, _ = here.join(trouble=broken)
        with pytest.raises(FedsplitError):
            client.exchange(Kind.FORWARD, 1, b"bad")
        assert until(lambda: seen[-1].what == "dismissed")
    assert seen[-1].reason == "A packet does not fit the body."
