"""What a decoder does with bytes that no honest end sent: one clear error, and nothing large is made."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.share.gate import Refused, admit
from fedsplit.types import FedsplitError, Report, Stream, Tensors, Update
from fedsplit.wire import CODECS, chain
from fedsplit.wire.frame import pack, unpack
from fedsplit.wire.link import Link

UP: Stream = "activations-up"
DOWN: Stream = "parameters-down"
LISTS = [[name] for name in CODECS] + [
    ["topk", "int8"],
    ["token-topk", "half"],
    ["delta", "topk", "qsgd", "zstd"],
    ["recover", "int8", "zstd"],
]
MOST = 500


def link(names: list[str], stream: Stream, **values: Any) -> Link:
    codecs = {stream: [CODECS[name]() for name in names]}
    chain.check(codecs)
    return Link(codecs, **values)


def stream_of(names: list[str]) -> Stream:
    return DOWN if {"delta", "feedback"} & set(names) else UP


def frames(names: list[str]) -> tuple[Stream, list[bytes]]:
    torch.manual_seed(0)
    stream, one = stream_of(names), link(names, stream_of(names))
    return stream, [one.encode(stream, {"x": torch.randn(4, 30)}) for _ in range(2)]


@pytest.mark.parametrize("names", LISTS, ids=",".join)
@settings(max_examples=30)
@given(data=st.data())
def test_broken_bytes_give_a_tensor_or_one_error(names: list[str], data: st.DataObject) -> None:
    stream, honest = frames(names)
    broken = bytearray(honest[1])
    if data.draw(st.booleans()):
        broken = broken[: data.draw(st.integers(0, len(broken) - 1))]
    for _ in range(data.draw(st.integers(0, 3)) if broken else 0):
        place = data.draw(st.integers(0, len(broken) - 1))
        broken[place] ^= 1 << data.draw(st.integers(0, 7))
    for shapes in (None, {"x": (4, 30)}):
        other = link(names, stream, most=MOST)
        other.decode(stream, honest[0])
        try:
            got = other.decode(stream, bytes(broken), shapes)
        except FedsplitError as error:
            assert len(str(error)) < 500
        else:
            assert all(x.numel() <= MOST for x in got.values())
            assert shapes is None or all(got[name].shape == shape for name, shape in shapes.items() if name in got)


def altered(names: list[str], **changes: torch.Tensor | None) -> bytes:
    """An honest frame with other side tensors; None leaves one out."""
    parts: Tensors = unpack(link(names, UP).encode(UP, {"x": torch.randn(4, 30)}))
    for name, value in changes.items():
        slot = name if name == "x" else f"x|0|{name}"
        parts.pop(slot, None)
        if value is not None:
            parts[slot] = value
    return pack(parts)


TERABYTES = torch.tensor([2**20, 2**20])
LIES = [
    ("topk", {"shape": TERABYTES}, "1099511627776 values, more than 500"),
    ("topk", {"shape": torch.tensor([-4, -30])}, "no shape"),
    ("topk", {"shape": torch.ones(9, dtype=torch.int64)}, "no shape"),
    ("topk", {"shape": torch.tensor([4.0, 30.0])}, "'shape' is float32"),
    ("topk", {"shape": torch.tensor([4, 31])}, "belong|are not"),
    ("topk", {"mask": None}, "'mask' is missing"),
    ("topk", {"mask": torch.zeros(15, dtype=torch.uint8)}, "names 0 places for 12 values"),
    ("topk", {"mask": torch.zeros(10**6, dtype=torch.uint8)}, "are not 120 bits"),
    ("topk", {"mask": torch.zeros(15, dtype=torch.int8)}, "'mask' is int8"),
    ("topk", {"x": torch.zeros(13)}, r"\(13,\) where 12 belong"),
    ("topk", {"x": torch.zeros(12, dtype=torch.uint8)}, "where 12 belong"),
    ("topk", {"extra": torch.zeros(1)}, "a part 'extra' that nobody sends"),
    ("token-topk", {"shape": TERABYTES}, "more than 500"),
    ("sign", {"shape": TERABYTES}, "more than 500"),
    ("sign", {"mean": torch.zeros(2)}, "'mean' is float32"),
    ("sign", {"x": torch.zeros(120)}, "are not 120 bits"),
    ("qsgd", {"shape": TERABYTES}, "more than 500"),
    ("qsgd", {"norm": torch.zeros(1, dtype=torch.float64)}, "'norm' is float64"),
    ("int8", {"scale": None}, "int8"),
    ("int8", {"scale": torch.zeros(5)}, "'scale' is float32"),
    ("int8", {"x": torch.zeros(4, 30)}, "not int8"),
    ("recover", {"shape": TERABYTES}, "more than 500"),
    ("recover", {"part": torch.zeros(3)}, "'part' is float32"),
    ("recover", {"sign": None}, "'sign' is missing"),
    ("half", {"whatever": torch.zeros(1)}, "a part 'whatever' that nobody sends"),
]


@pytest.mark.parametrize(
    "name, changes, sentence", LIES, ids=lambda value: ",".join(value) if isinstance(value, dict) else ""
)
def test_lies_are_told_apart(name: str, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FedsplitError, match=rf"Received 'x' \({UP}\) that cannot be decoded: .*({sentence})"):
        link([name], UP, most=MOST).decode(UP, altered([name], **changes))


@pytest.mark.parametrize("extra", ["x|1|mask", "x|0", "x|0|mask|more", "y|0|mask", "x|-1|mask", "x||mask", "x|00|mask"])
def test_side_tensors_of_nothing_are_refused(extra: str) -> None:
    parts = unpack(altered(["topk"])) | {extra: torch.zeros(1)}
    with pytest.raises(FedsplitError):
        link(["topk"], UP).decode(UP, pack(parts))
    with pytest.raises(FedsplitError, match="nobody sends"):
        Link({}).decode(UP, pack({"x": torch.zeros(1), extra: torch.zeros(1)}))


def test_places_outside_and_twice_are_refused() -> None:
    codec = CODECS["topk"](keep=0.01)
    parts = unpack(Link({UP: [codec]}).encode(UP, {"x": torch.randn(2000)}))
    for places, sentence in (([2000 - 2**15, *range(19)], "outside"), ([5 - 2**15] * 20, "names 1 places for 20")):
        lie = parts | {"x|0|index": torch.tensor(places, dtype=torch.int16)}
        with pytest.raises(FedsplitError, match=sentence):
            Link({UP: [codec]}).decode(UP, pack(lie))


def test_activations_of_whole_numbers_are_refused_with_and_without_codecs() -> None:
    for codecs in ({}, {UP: [CODECS["half"]()]}):
        for dtype in (torch.int64, torch.uint8):
            with pytest.raises(FedsplitError):
                Link(codecs).decode(UP, pack({"x": torch.zeros(3, dtype=dtype)}))


def test_a_gradient_of_another_shape_is_refused_with_and_without_codecs() -> None:
    for codecs in ({}, {UP: [CODECS["half"]()]}):
        with pytest.raises(FedsplitError, match=r"Received 'x' .*float.* \(3, 2\)"):
            Link(codecs).decode(UP, pack({"x": torch.zeros(3, 2)}), {"x": (2, 3)})


def test_a_compressed_frame_says_its_length_and_is_not_believed_beyond_the_limit() -> None:
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(10**7))
    small = Link({UP: [CODECS["zstd"]()]}, most=1000)
    assert len(bomb) < 1000
    with pytest.raises(FedsplitError, match="a frame of 10000000 bytes, it says, which is not at most 73536"):
        small.decode(UP, bomb)
    terabytes = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 2**42) + b"\x01\x00\x00"
    with pytest.raises(FedsplitError, match="4398046511104 bytes"):
        small.decode(UP, terabytes)
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * 100)
    with pytest.raises(FedsplitError, match="a frame of -1 bytes"):
        small.decode(UP, silent)
    with pytest.raises(FedsplitError, match="not zstd's"):
        small.decode(UP, b"nonsense of some length")
    good = CODECS["zstd"]().pack(pack({"x": torch.zeros(3)}))
    with pytest.raises(FedsplitError, match="not zstd's"):
        small.decode(UP, good + good)


def test_a_difference_from_nothing_is_refused() -> None:
    one, x = link(["delta"], DOWN), {"w": torch.ones(3)}
    one.encode(DOWN, x)
    with pytest.raises(FedsplitError, match="nothing that it could be from"):
        link(["delta"], DOWN).decode(DOWN, one.encode(DOWN, x))


def test_the_gate_says_what_a_codec_did_not_like() -> None:
    stream: Stream = "parameters-up"
    codecs, expected = {stream: [CODECS["topk"](keep=0.5)]}, {"w": torch.zeros(2, 3)}

    def refused(tensors: Tensors) -> str:
        update = Update(0, 5, Link(codecs).encode(stream, tensors), b"", Report())
        with pytest.raises(Refused) as caught:
            admit(update, Link(codecs), expected, {}, 10_000)
        return str(caught.value)

    assert "more than 6" in refused({"w": torch.zeros(2, 4)})
    assert "instead of" in refused({"w": torch.zeros(3, 2)}) or "(3, 2)" in refused({"w": torch.zeros(3, 2)})
    assert "'v' that was not asked for" in refused({"v": torch.zeros(2, 3)})
    assert "lacks parameter 'w'" in refused({})
    update = Update(0, 5, Link(codecs).encode(stream, {"w": torch.randn(2, 3)}), b"", Report())
    assert int((admit(update, Link(codecs), expected, {}, 10_000)[0]["w"] != 0).sum()) == 3
