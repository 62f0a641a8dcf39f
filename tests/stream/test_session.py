"""The session's states without sockets: a fake clock, and hypothesis in the place of the network."""

from __future__ import annotations

import os
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from peers import Echo

from fedsplit.runtime.stream.limits import LEAST_BYTES_PER_S, Bucket, Limits, Pace
from fedsplit.runtime.stream.packet import LEAST_CHUNK_BYTES, Kind, Packet
from fedsplit.runtime.stream.session import Pending, Session, State
from fedsplit.runtime.stream.ticket import Ticket
from fedsplit.types import FedsplitError

MORE = int(os.environ.get("FEDSPLIT_FUZZ", "1"))
TICKET = Ticket(bytes(32), 1, 2, 3, bytes(32), expires_s=100.0)
LIMITS = Limits(idle_s=10.0, session_s=50.0)


def opened(limits: Limits = LIMITS, now_s: float = 0.0) -> Session:
    session = Session(TICKET, Echo, 5, limits, now_s)
    session.attach("stream", now_s)
    return session


def send(session: Session, sequence: int, now_s: float = 0.0, **others: Any) -> Pending:
    pending, new = session.receive(Packet(others.pop("kind", Kind.FORWARD), sequence, codecs=5, **others), now_s)
    assert new
    return pending


def answer(session: Session, pending: Pending, now_s: float = 0.0) -> Packet:
    reply = Packet(Kind.REPLY, pending.sequence, 0, 5)
    session.answered(pending, reply, 0.0, now_s)
    return reply


def test_rates_make_it_wait_by_the_clock_and_do_not_count_as_silence() -> None:
    bucket = Bucket(per_s=100.0, burst=200.0, now_s=0.0)
    assert bucket.take(200, 0.0) == 0.0
    assert bucket.take(50, 0.0) == 0.5
    assert bucket.take(50, 1.0) == 0.0  # 50 had to be paid back, 50 were there
    assert bucket.take(1000, 100.0) == 8.0  # no more than the burst was saved
    assert Bucket(0.0, 0.0, 0.0).take(10**9, 0.0) == 0.0
    session = opened(Limits(idle_s=10.0, bytes_per_s=1000.0, packets_per_s=2.0, chunk_bytes=1024))
    assert session.toll(1024, 1, 0.0) == 0.0
    assert session.toll(15_000, 1, 0.0) == 15.0
    assert session.overdue(24.0) == "" and "silent" in session.overdue(25.1)
    assert [session.toll(0, 1, 15.0) for _ in range(3)] == [0.0, 0.0, 0.5]


def test_messages_are_as_long_as_a_second_of_the_network() -> None:
    pace = Pace(16 << 20)
    assert pace.chunk_bytes == 1 << 20
    pace.sent(100, 100.0)
    assert pace.chunk_bytes == 1 << 20
    pace.sent(1_000_000, 4.0)
    assert pace.chunk_bytes == 250_000
    pace.sent(1_000_000, 400.0)
    assert pace.chunk_bytes == LEAST_CHUNK_BYTES
    pace.sent(1_000_000, 0.001)
    assert pace.chunk_bytes == 16 << 20


def test_a_session_is_overdue_when_its_peer_is_silent_slow_or_too_long() -> None:
    assert "expired" in Session(TICKET, Echo, 5, LIMITS, 0.0).overdue(100.0)
    assert opened().overdue(9.9) == "" and "silent" in opened().overdue(10.1)
    trickle = opened()
    for second in range(1, 30):
        trickle.progress(LEAST_BYTES_PER_S // 2, 0, float(second))
    assert "silent" in trickle.overdue(29.0)
    fast = opened()
    for second in range(1, 30):
        fast.progress(2 * LEAST_BYTES_PER_S, 0, float(second))
    assert fast.overdue(29.0) == ""
    busy = opened()
    pending = send(busy, 1)
    assert busy.overdue(40.0) == "" and "50 s" in busy.overdue(50.1)  # the server's own time is not silence
    answer(busy, pending, 40.0)
    assert busy.overdue(49.0) == ""
    away = opened()
    away.detach("stream")
    assert away.state is State.AWAY and away.overdue(9.9) == "" and "silent" in away.overdue(10.1)


def test_a_done_session_stays_until_it_is_fetched() -> None:
    session = opened()
    session.handler = Echo()
    answer(session, send(session, 1, kind=Kind.DONE))
    assert session.is_done and session.overdue(10_000.0) == ""
    session.handler = None
    assert session.overdue(5.0) == "" and session.overdue(10_000.0)


def test_what_may_not_come_is_refused_and_changes_nothing() -> None:
    session = opened()
    answer(session, send(session, 1))
    answer(session, send(session, 2))
    wrong = {
        "out of order": Packet(Kind.FORWARD, 1, codecs=5),
        "the last one was 2": Packet(Kind.FORWARD, 4, codecs=5),
        "not the same": Packet(Kind.BACKWARD, 2, codecs=5),
        "codecs": Packet(Kind.FORWARD, 3, codecs=6),
        "does not belong": Packet(Kind.REPLY, 3, codecs=5),
    }
    for words, packet in wrong.items():
        with pytest.raises(FedsplitError, match=words):
            session.receive(packet, 0.0)
    assert session.sequence == 2 and session.state is State.OPEN
    send(session, 3)
    with pytest.raises(FedsplitError, match="not answered"):
        session.receive(Packet(Kind.FORWARD, 4, codecs=5), 0.0)


class Network(RuleBasedStateMachine):
    """A peer that may do anything, in any order, against a model of what was taken and answered."""

    tried = 0

    def __init__(self) -> None:
        super().__init__()
        self.session = Session(TICKET, Echo, 5, LIMITS, 0.0)
        self.now_s = 0.0
        self.streams = 0
        self.carrier: int | None = None
        self.taken: list[Packet] = []
        self.waiting: list[Pending] = []
        self.replies: list[Packet] = []
        self.gone = self.done = False

    @rule(seconds=st.floats(0, 3))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def open(self) -> None:
        self.streams += 1
        if self.gone:
            with pytest.raises(FedsplitError):
                self.session.attach(self.streams, self.now_s)
            return
        assert self.session.attach(self.streams, self.now_s) == self.carrier
        self.carrier = self.streams

    @rule(back=st.integers(0, 2))
    def lose(self, back: int) -> None:
        """The newest stream ends, or an older one that was replaced already."""
        self.session.detach(self.streams - back)
        if self.carrier == self.streams - back:
            self.carrier = None

    @rule(
        step=st.integers(-2, 3),
        kind=st.sampled_from([*Kind, Kind.FORWARD, Kind.FORWARD, Kind.LEARN]),
        value=st.integers(0, 1),
        codecs=st.sampled_from([5, 5, 5, 5, 6]),
    )
    def send(self, step: int, kind: Kind, value: int, codecs: int) -> None:
        Network.tried += 1
        packet = Packet(kind, max(0, len(self.taken) + step), value, codecs, check=value)
        usable = self.streams and not self.gone and codecs == 5
        usable = usable and kind in (Kind.FORWARD, Kind.BACKWARD, Kind.LEARN, Kind.DONE)
        last = self.taken[-1] if self.taken else None
        again = usable and last is not None and packet == last
        following = usable and step == 1 and not self.waiting and not self.done
        if not again and not following:
            with pytest.raises(FedsplitError):
                self.session.receive(packet, self.now_s)
            return
        pending, new = self.session.receive(packet, self.now_s)
        assert new == (not again)
        if new:
            self.taken.append(packet)
            self.waiting.append(pending)
        elif self.waiting:
            assert pending is self.waiting[0] and pending.reply is None
        else:
            assert pending.reply is self.replies[-1]

    @precondition(lambda self: self.waiting)
    @rule()
    def answer(self) -> None:
        pending = self.waiting.pop()
        reply = Packet(Kind.REPLY, pending.sequence, len(self.replies), 5)
        assert self.session.answered(pending, reply, 0.0, self.now_s) == (not self.gone)
        if not self.gone:
            self.replies.append(reply)
            self.done = pending.kind is Kind.DONE

    @precondition(lambda self: len(self.taken) > 3)
    @rule()
    def dismiss(self) -> None:
        self.session.end("dismissed")
        self.gone, self.carrier = True, None
        assert all(one.reply is not None and one.reply.kind is Kind.ERROR for one in self.waiting)

    @invariant()
    def agrees(self) -> None:
        assert [packet.sequence for packet in self.taken] == [*range(1, len(self.taken) + 1)]
        assert self.session.stream == self.carrier
        if self.gone:
            expected = State.GONE
        elif self.done:
            expected = State.DONE
        elif not self.streams:
            expected = State.EXPECTED
        else:
            expected = State.OPEN if self.carrier else State.AWAY
        assert self.session.state is expected
        if not self.gone:
            assert self.session.sequence == len(self.taken) and self.session.busy == bool(self.waiting)
        assert self.session.figures(self.now_s).packets <= Network.tried
        assert not self.waiting or not self.session.overdue(min(self.now_s, 49.0)) or not self.streams


def test_no_order_of_packets_losses_and_ends_breaks_it(record_property: Any) -> None:
    Network.tried = 0
    size = hypothesis.settings(max_examples=100 * MORE, stateful_step_count=40)
    run_state_machine_as_test(Network, settings=size)
    record_property("inputs", Network.tried)
    print(f"{Network.tried} inputs tried")
