"""Who may not open a session, what a server does not take, and who cannot hold it."""

from __future__ import annotations

import dataclasses
import queue
import secrets
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from peers import CODECS, LIMITS, Site, certificates, site, until

from fedsplit.runtime.stream.channel import METHOD, SERVICE
from fedsplit.runtime.stream.limits import Limits
from fedsplit.runtime.stream.packet import Assembler, Kind, Packet, chunks
from fedsplit.runtime.stream.server import SPARE
from fedsplit.runtime.stream.ticket import Ticket, prove, proves
from fedsplit.types import FedsplitError


class Raw:
    """A peer that sends what it likes over a bare gRPC stream."""

    def __init__(self, here: Site) -> None:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{here.port}", options=[("grpc.max_send_message_length", -1)])
        self.messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.replies = self.channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter(self.messages.get, None), timeout=20)

    def send(self, *packets: Packet | bytes) -> None:
        for packet in packets:
            for part in [packet] if isinstance(packet, bytes) else chunks(packet):
                self.messages.put(part)

    def read(self) -> Packet:
        assembler = Assembler(1 << 20)
        while (packet := assembler.add(next(self.replies))) is None:
            pass
        return packet

    def join(self, ticket: Ticket, key: Ed25519PrivateKey) -> Packet:
        challenge = self.read().payload
        self.send(Packet(Kind.OPEN, codecs=CODECS, payload=prove(ticket.token, key, challenge)))
        return self.read()

    def error(self) -> str:
        """What the server says last; then the stream must end."""
        packet = self.read()
        assert packet.kind is Kind.ERROR and next(self.replies, None) is None
        return packet.payload.decode()

    def close(self) -> None:
        self.messages.put(None)
        self.replies.cancel()
        self.channel.close()


def known(here: Site, **others: Any) -> tuple[Ticket, Ed25519PrivateKey]:
    key = Ed25519PrivateKey.generate()
    ticket = here.ticket(key, **others)
    here.expect(ticket)
    return ticket, key


def test_a_token_opens_for_its_own_node_in_time_only() -> None:
    with site() as here:
        ticket, key = known(here)
        late, late_key = known(here, expires_in_s=-1.0)
        unknown = dataclasses.replace(ticket, token=secrets.token_bytes(32))
        short = dataclasses.replace(ticket, token=b"")
        tries = [(unknown, key), (ticket, Ed25519PrivateKey.generate()), (late, late_key), (ticket, late_key)]
        said = set()
        for which, by in [*tries, (short, key)]:
            with pytest.raises(FedsplitError, match="refused") as caught:
                here.client(which, by).exchange(Kind.FORWARD, 0, b"x")
            said.add(str(caught.value))
        assert len(said) == 1  # nothing tells one reason from another
        assert here.handlers == []
        assert here.client(ticket, key).exchange(Kind.FORWARD, 0, b"x") == (1, b"x")


def test_a_proof_is_of_one_token_one_key_one_challenge_and_a_time() -> None:
    key, challenge = Ed25519PrivateKey.generate(), bytes(32)
    ticket = Ticket(b"t" * 32, 1, 2, 3, key.public_key().public_bytes_raw(), expires_s=10.0)
    assert proves(prove(ticket.token, key, challenge), ticket, challenge, 9.9)
    assert not proves(prove(ticket.token, key, challenge), ticket, challenge, 10.0)
    assert not proves(prove(b"u" * 32, key, challenge), ticket, challenge, 0.0)
    assert not proves(prove(ticket.token, key, b"c" * 32), ticket, challenge, 0.0)
    assert not proves(prove(ticket.token, Ed25519PrivateKey.generate(), challenge), ticket, challenge, 0.0)
    assert not proves(b"", ticket, challenge, 0.0)


def test_an_old_proof_is_of_no_use() -> None:
    with site() as here:
        ticket, key = known(here)
        peer = Raw(here)
        old = prove(ticket.token, key, peer.read().payload)
        peer.close()
        peer = Raw(here)
        peer.read()
        peer.send(Packet(Kind.OPEN, codecs=CODECS, payload=old))
        with pytest.raises(grpc.RpcError) as caught:
            peer.read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        peer.close()


def test_tokens_are_used_once_and_have_a_length() -> None:
    with site() as here:
        ticket, _ = known(here)
        with pytest.raises(FedsplitError, match="in use"):
            here.expect(ticket)
        with pytest.raises(FedsplitError, match="32 bytes"):
            here.expect(dataclasses.replace(ticket, token=b"short"))


def test_a_wrong_certificate_is_one_sentence() -> None:
    with site(tls=certificates()) as here:
        ticket, key = known(here)
        for others in ({"root_certificates": certificates()[0]}, {"name_override": "elsewhere"}):
            with pytest.raises(FedsplitError, match="certificate") as caught:
                here.client(ticket, key, **others).exchange(Kind.FORWARD, 0, b"x")
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
        with pytest.raises(FedsplitError, match="not readable"):
            here.client(ticket, key, root_certificates=b"nonsense").exchange(Kind.FORWARD, 0, b"x")
        with pytest.raises(FedsplitError, match="No connection"):
            here.client(ticket, key, root_certificates="plaintext", patience_s=0.3).exchange(Kind.FORWARD, 0, b"")
    with site() as here, pytest.raises(FedsplitError, match="does not speak TLS"):
        here.client(*known(here), root_certificates=certificates()[0]).exchange(Kind.FORWARD, 0, b"x")
    with site(tls=certificates("body.example")) as here:
        client = here.client(*known(here), name_override="body.example")
        assert client.exchange(Kind.FORWARD, 0, b"x") == (1, b"x")


def test_codecs_must_be_the_same() -> None:
    with site() as here:
        with pytest.raises(FedsplitError, match="codecs"):
            here.client(*known(here), codecs=CODECS + 1).exchange(Kind.FORWARD, 0, b"x")
        peer, (ticket, key) = Raw(here), known(here)
        peer.join(ticket, key)
        peer.send(Packet(Kind.FORWARD, 1, codecs=CODECS + 1))
        assert "codecs" in peer.error()
        peer.close()
        assert here.handlers == []


def test_replayed_and_damaged_packets_end_the_stream_and_not_the_session() -> None:
    def packet(number: int, kind: Kind = Kind.FORWARD, payload: bytes = b"x") -> Packet:
        return Packet(kind, number, 0, CODECS, payload)

    whole = next(iter(chunks(packet(3))))
    wrong: dict[str, Packet | bytes] = {
        "out of order: the last one was 2": packet(1),
        "Packet 9 is out of order": packet(9),
        "not the same": packet(2, payload=b"y"),
        "HELLO does not belong": packet(3, Kind.HELLO),
        "damaged": whole[:-1] + b"z",
        "not a packet": b"GET / HTTP/1.1" * 4,
        "less than a header": whole[:9],
        "more than it declares": whole + b"!",
        "more than the limit": whole[:24] + (1 << 40).to_bytes(8, "little") + whole[32:],
    }
    with site() as here:
        ticket, key = known(here)
        peer = Raw(here)
        assert peer.join(ticket, key).value == 0
        for number in (1, 2):
            peer.send(packet(number))
            assert peer.read().sequence == number
        peer.send(packet(2))  # the last one again: its reply again
        assert peer.read() == Packet(Kind.REPLY, 2, 1, CODECS, b"x")
        for words, bad in wrong.items():
            peer.send(bad)
            assert words in peer.error()
            peer.close()
            peer = Raw(here)
            assert peer.join(ticket, key).value == 2
        peer.send(packet(3))
        assert peer.read().sequence == 3
        peer.close()
        assert here.handlers[0].values == [0, 0, 0] and here.handlers[0].closed == 0


def test_a_packet_above_the_limit_is_refused_at_both_ends() -> None:
    with site(dataclasses.replace(LIMITS, packet_bytes=100_000)) as here:
        with pytest.raises(FedsplitError, match="limit of 100000"):
            here.client(*known(here)).exchange(Kind.FORWARD, 0, bytes(100_001))
        client = here.client(*known(here), limits=dataclasses.replace(LIMITS, packet_bytes=1000))
        with pytest.raises(FedsplitError, match="limit of 1000"):
            client.exchange(Kind.FORWARD, 0, bytes(2000))
        with pytest.raises(FedsplitError, match="limit of 1000"):
            client.exchange(Kind.FORWARD, 0, b"")


def test_sessions_above_the_limit_are_refused_at_once_and_others_go_on() -> None:
    with site(dataclasses.replace(LIMITS, sessions=2)) as here:
        clients = [here.client(*known(here), patience_s=1.0 if last else 20.0) for last in (False, False, True)]
        for client in clients[:2]:
            client.exchange(Kind.FORWARD, 0, b"x")
        with pytest.raises(FedsplitError, match="all of its 2 sessions"):
            clients[2].exchange(Kind.FORWARD, 0, b"x")
        clients[0].done()
        assert here.client(*known(here)).exchange(Kind.FORWARD, 0, b"x") == (1, b"x")
        assert clients[1].exchange(Kind.FORWARD, 0, b"x") == (1, b"x")


def test_streams_without_a_token_leave_room_and_are_ended() -> None:
    with site(dataclasses.replace(LIMITS, sessions=2)) as here:
        silent = [Raw(here) for _ in range(SPARE)]
        for peer in silent:
            assert peer.read().kind is Kind.HELLO
        one_more = Raw(here)
        with pytest.raises(grpc.RpcError) as caught:
            one_more.read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        silent[0].close()
        assert here.client(*known(here)).exchange(Kind.FORWARD, 0, b"x") == (1, b"x")
        for peer in (*silent, one_more):
            peer.close()
    with site(dataclasses.replace(LIMITS, idle_s=0.2)) as here:
        peer = Raw(here)
        with pytest.raises(grpc.RpcError):
            while True:
                peer.read()
        assert until(lambda: not here.server._streams)
        peer.close()


def test_a_silent_peer_is_dismissed_and_its_thread_freed() -> None:
    with site(Limits(sessions=1, idle_s=1.0)) as here:
        ticket, key = known(here)
        peer = Raw(here)
        peer.join(ticket, key)
        peer.send(Packet(Kind.FORWARD, 1, 0, CODECS, b"x"))
        assert peer.read().sequence == 1
        peer.send(next(iter(chunks(Packet(Kind.FORWARD, 2, 0, CODECS, bytes(1 << 20))))))  # a header, and no more
        assert until(lambda: here.handlers[0].closed == 1)
        with pytest.raises(grpc.RpcError):
            peer.read()
        row = here.server.sessions()[0]
        assert row.state == "gone" and "silent" in row.last_error
        with pytest.raises(FedsplitError, match="refused"):
            here.client(ticket, key).exchange(Kind.FORWARD, 2, b"x")
        assert until(lambda: not here.server._streams)
        assert here.client(*known(here)).exchange(Kind.FORWARD, 0, b"x") == (1, b"x")  # its place is free again
        peer.close()


def test_a_handler_that_raises_ends_the_session_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    def trouble(payload: bytes) -> None:
        if payload == b"known":
            raise FedsplitError("The activations are not finite:\nsend others.")
        if payload == b"unknown":
            raise RuntimeError("secret of the server")

    with site() as here:
        for payload, words in ((b"known", "not finite: send others"), (b"unknown", "^internal error$")):
            client, ticket = here.join(trouble=trouble)
            assert client.exchange(Kind.LEARN, 0, b"fine") == (1, b"fine")
            with pytest.raises(FedsplitError, match=words):
                client.exchange(Kind.LEARN, 0, payload)
            assert until(lambda: here.handlers[-1].closed == 1)
            assert here.server.finished(ticket.token) is None
            assert here.server.sessions()[-1].last_error
        with pytest.raises(FedsplitError, match="internal error"):
            client.exchange(Kind.LEARN, 0, b"fine")  # over is over
    assert [one.closed for one in here.handlers] == [1, 1]
    assert "secret of the server" in caplog.text


def test_a_server_without_the_service_and_nobody_at_all() -> None:
    from concurrent.futures import ThreadPoolExecutor

    other = grpc.server(ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    with site() as here:
        ticket, key = known(here)
        with pytest.raises(FedsplitError, match="no server of fedsplit"):
            here.client(ticket, key, port=port).exchange(Kind.FORWARD, 0, b"x")
        other.stop(None).wait()
        with pytest.raises(FedsplitError, match="within 0.2 s"):
            here.client(ticket, key, port=port, patience_s=0.2).exchange(Kind.FORWARD, 0, b"x")
