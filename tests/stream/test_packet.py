"""The format: what goes in comes out, and whatever else arrives is refused in one sentence."""

from __future__ import annotations

import os
import random
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.runtime.stream.packet import (
    BLOCK_BYTES,
    HEADER_BYTES,
    JOIN_BYTES,
    PLAIN_BYTES,
    Assembler,
    Kind,
    Packet,
    chunks,
    fingerprint,
)
from fedsplit.types import FedsplitError

MOST = 1 << 20
MORE = int(os.environ.get("FEDSPLIT_FUZZ", "1"))
"""How many times as many inputs are to be tried."""


def assemble(parts: list[bytes], most_bytes: int = MOST) -> list[Packet]:
    """All packets of a stream that ends after these messages."""
    assembler = Assembler(most_bytes)
    packets = [packet for part in parts if (packet := assembler.add(part)) is not None]
    assembler.end()
    return packets


def flat(packet: Packet) -> bytes:
    return b"".join(chunks(packet))


@pytest.mark.parametrize("size", [0, 1, PLAIN_BYTES, PLAIN_BYTES + 1, 200_000, JOIN_BYTES - HEADER_BYTES, MOST])
@pytest.mark.parametrize("chunk_bytes", [1024, 65536, 1 << 24])
def test_what_is_cut_is_put_together(size: int, chunk_bytes: int) -> None:
    first = Packet(Kind.LEARN, 2**64 - 1, 2**64 - 1, 2**32 - 1, random.Random(size).randbytes(size))
    second = Packet(Kind.REPLY, 1, 2, 3, b"x")
    parts = [*chunks(first, chunk_bytes), *chunks(second, chunk_bytes)]
    assert all(len(part) <= chunk_bytes for part in parts)
    assert assemble(parts) == [first, second]


def test_the_bytes_are_those_of_the_specification() -> None:
    payload = bytes(range(256)) * 80 + b"rest"  # five blocks and four bytes
    data = flat(Packet(Kind.FORWARD, 7, 2**63 + 1, 0xABCDEF01, payload))
    fields = b"FSPK" + bytes([1, 3, 0, 0]) + (7).to_bytes(8, "little") + (2**63 + 1).to_bytes(8, "little")
    fields += len(payload).to_bytes(8, "little") + (0xABCDEF01).to_bytes(4, "little")
    sums = b""
    for block in range(5):
        words = np.frombuffer(payload[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES], "<u8")
        sums += (sum(map(int, words)) % 2**64).to_bytes(8, "little")
    assert data[:36] == fields and HEADER_BYTES == 40
    assert data[36:40] == zlib.crc32(fields + sums + b"rest").to_bytes(4, "little")
    short = flat(Packet(Kind.DONE, payload=b"short"))
    assert short[36:40] == zlib.crc32(short[:36] + b"short").to_bytes(4, "little")
    assert fingerprint("int8") == zlib.crc32(b"int8")


GOOD = flat(Packet(Kind.FORWARD, 1, 2, 3, b"payload" * 10))
WRONG = {
    "nothing": (b"", "less than a header"),
    "half a header": (GOOD[:20], "less than a header"),
    "magic": (b"HTTP" + GOOD[4:], "not a packet"),
    "version": (GOOD[:4] + b"\x02" + GOOD[5:], "version 2"),
    "kind": (GOOD[:5] + b"\x09" + GOOD[6:], "kind 9"),
    "reserved": (GOOD[:6] + b"\x01" + GOOD[7:], "kind"),
    "sequence": (GOOD[:8] + b"\x02" + GOOD[9:], "damaged"),
    "value": (GOOD[:16] + b"\x03" + GOOD[17:], "damaged"),
    "codecs": (GOOD[:32] + b"\x04" + GOOD[33:], "damaged"),
    "check": (GOOD[:36] + bytes([GOOD[36] ^ 1]) + GOOD[37:], "damaged"),
    "payload": (GOOD[:-1] + b"Y", "damaged"),
    "truncated": (GOOD[:-1], "cut short"),
    "trailing": (GOOD + b"!", "1 bytes more"),
    "oversized": (GOOD[:24] + (MOST + 1).to_bytes(8, "little") + GOOD[32:], "more than the limit"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str) -> None:
    data, words = WRONG[name]
    with pytest.raises(FedsplitError, match=words):
        assemble([data])


def test_an_empty_message_within_a_packet_is_refused() -> None:
    parts = list(chunks(Packet(Kind.FORWARD, payload=bytes(2000)), 1024))
    assert len(parts[0]) == HEADER_BYTES
    with pytest.raises(FedsplitError, match="empty"):
        assemble([parts[0], b""])


@pytest.mark.parametrize("at", [0, 8, 4095, 4096, 70_000, 99_999])
def test_one_flipped_bit_of_a_long_payload_is_found(at: int) -> None:
    data = bytearray(flat(Packet(Kind.FORWARD, 1, payload=random.Random(1).randbytes(100_000))))
    data[HEADER_BYTES + at] ^= 0x10
    with pytest.raises(FedsplitError, match="damaged"):
        assemble([bytes(data)])


def test_blocks_that_changed_places_are_found() -> None:
    a, b = (random.Random(seed).randbytes(BLOCK_BYTES) for seed in (1, 2))
    data = flat(Packet(Kind.FORWARD, 1, payload=a + b + bytes(PLAIN_BYTES)))
    swapped = data[:HEADER_BYTES] + b + a + data[HEADER_BYTES + 2 * BLOCK_BYTES :]
    with pytest.raises(FedsplitError, match="damaged"):
        assemble([swapped])


def test_a_declared_length_takes_no_memory() -> None:
    header = next(iter(chunks(Packet(Kind.FORWARD, payload=bytes(MOST)), 1024)))
    assert len(header) == HEADER_BYTES
    tracemalloc.start()
    try:
        one, other = Assembler(MOST), Assembler(MOST - 1)
        assert one.add(header) is None and one.waiting
        with pytest.raises(FedsplitError, match="limit"):
            other.add(header)
        assert not other.waiting and tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


# Fuzz

kinds, words = st.sampled_from(Kind), st.integers(0, 2**64 - 1)
packets = st.builds(Packet, kinds, words, words, st.integers(0, 2**32 - 1), st.binary(max_size=300))


def survives(parts: list[bytes]) -> list[Packet]:
    """Either packets or a `FedsplitError`, and never more kept than came."""
    assembler, found = Assembler(2000), []
    try:
        for part in parts:
            if packet := assembler.add(part):
                assert len(packet.payload) <= min(2000, sum(map(len, parts)))
                found.append(packet)
        assembler.end()
    except FedsplitError as error:
        assert "\n" not in str(error)
    return found


def test_arbitrary_bytes(record_property: Any) -> None:
    tried = 0

    @settings(max_examples=400 * MORE)
    @given(st.lists(st.binary(max_size=200), max_size=5), st.booleans())
    def check(parts: list[bytes], headed: bool) -> None:
        nonlocal tried
        tried += 1
        assert survives([b"FSPK\x01" + part for part in parts] if headed else parts) == []

    check()
    record_property("inputs", tried)
    print(f"{tried} inputs tried")


def test_mutated_packets(record_property: Any) -> None:
    tried = 0

    @settings(max_examples=400 * MORE)
    @given(packets, st.data())
    def check(packet: Packet, data: st.DataObject) -> None:
        nonlocal tried
        tried += 1
        whole = bytearray(flat(packet))
        for _ in range(data.draw(st.integers(1, 3))):
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
        end = data.draw(st.integers(0, len(whole)))
        cut = bytes(whole[:end])
        same = cut == flat(packet)
        assert survives([cut]) == ([packet] if same else [])

    check()
    record_property("inputs", tried)


def test_many_mutated_streams(record_property: Any) -> None:
    """The same at the speed of the decoder: bits flipped, bytes lost and doubled, messages cut anywhere."""
    draw, tried, whole = random.Random(0), 20_000 * MORE, 0
    for _ in range(tried):
        packet = Packet(draw.choice(list(Kind)), draw.getrandbits(64), draw.getrandbits(64), 5, draw.randbytes(40))
        data = bytearray(flat(packet))
        at = draw.randrange(len(data))
        match draw.randrange(4):
            case 0:
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                del data[at : at + draw.randrange(1, 9)]
            case 2:
                data[at:at] = data[at : at + draw.randrange(1, 9)]
            case _:
                data += flat(packet)[: draw.randrange(3)]
        cut = draw.randrange(HEADER_BYTES, HEADER_BYTES + 9)
        found = survives([bytes(data[:cut]), bytes(data[cut:])])
        # The rest may be empty or missing, but nothing but the packet itself is ever made of it.
        assert found in ([], [packet])
        whole += bool(found)
    assert whole < tried / 4
    record_property("inputs", tried)
