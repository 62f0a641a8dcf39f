"""Invariant 9 and what each codec claims: shapes, bytes, exactness at ratio 1, means, contraction, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsplit.hollow import frame_bytes
from fedsplit.types import STREAMS, FedsplitError, Order, Plan, Stream
from fedsplit.wire import CODECS
from fedsplit.wire.codec import PARAMETERS
from fedsplit.wire.frame import pack
from fedsplit.wire.link import Link
from fedsplit.wire.parts import finite, largest, pack_bits, pack_levels, unpack_levels

# Settings of every codec that the contracts are checked with.
SETTINGS: dict[str, list[dict[str, Any]]] = {name: [{}] for name in CODECS} | {
    "topk": [{"keep": 1.0}, {"keep": 0.4}, {"keep": 0.01}],
    "token-topk": [{"keep": 1.0}, {"keep": 0.4}, {"keep": 0.01}],
    "sign": [{"scope": "tensor"}, {"scope": "row"}],
    "qsgd": [{"levels": 1, "bucket": 0}, {"levels": 7, "bucket": 5}, {"levels": 127, "norm": "l2"}],
    "int8": [{"rounding": "nearest"}, {"rounding": "stochastic"}],
    "recover": [{"keep": 1.0}, {"keep": 0.4, "rule": "clamp"}, {"keep": 0.01, "rule": "none"}, {"stale": "received"}],
}
CASES = [(name, values) for name, settings in SETTINGS.items() for values in settings]
# Settings at which nothing is lost.
EXACT = [
    ("topk", {"keep": 1.0}),
    ("token-topk", {"keep": 1.0}),
    ("recover", {"keep": 1.0}),
    ("zstd", {}),
    ("feedback", {}),
]
# The relative error of a codec on Gaussian values, at its defaults and at most.
LOSSES = {
    "sign": 0.65,
    "topk": 0.76,
    "token-topk": 0.6,
    "qsgd": 0.35,
    "recover": 0.3,
    "int8": 0.01,
    "half": 5e-4,
    "bfloat16": 4e-3,
}
SHAPES = st.lists(st.integers(0, 6), max_size=4)
UP: Stream = "activations-up"


def ends(*codecs: Any, stream: Stream = UP, **values: Any) -> tuple[Link, Link]:
    return Link({stream: codecs}, **values), Link({stream: codecs}, **values)


def passed(x: Tensor, *codecs: Any, stream: Stream = UP) -> Tensor:
    one, other = ends(*codecs, stream=stream)
    return other.decode(stream, one.encode(stream, {"x": x}))["x"]


def streams_of(name: str) -> tuple[Stream, ...]:
    return PARAMETERS if hasattr(CODECS[name], "echo") else STREAMS


@pytest.mark.parametrize("name, values", CASES, ids=str)
@settings(max_examples=12)
@given(shape=SHAPES)
def test_shape_type_and_bytes(name: str, values: dict[str, Any], shape: list[int]) -> None:
    codec, tensors = CODECS[name](**values), {"x": torch.randn(shape), "labels": torch.arange(3)}
    for stream in streams_of(name):
        one, other = ends(codec, stream=stream)
        for _ in range(2):
            frame = one.encode(stream, tensors)
            got = other.decode(stream, frame, {"x": tuple(shape), "labels": (3,)})
            assert got["x"].shape == tuple(shape) and got["x"].dtype == torch.float32
            assert torch.equal(got["labels"], tensors["labels"])
        sizes = {link.sizes[stream] for link in (one, other)}
        assert {link.raw[stream] for link in (one, other)} == {2 * len(pack(tensors))}
        if name != "zstd" and stream != "parameters-up":  # where no round began
            assert sizes == {sum(frame_bytes({stream: [codec]}, stream, tensors, again) for again in (False, True))}


@pytest.mark.parametrize("name, values", EXACT, ids=str)
@settings(max_examples=12)
@given(shape=SHAPES)
def test_nothing_is_lost_at_ratio_one(name: str, values: dict[str, Any], shape: list[int]) -> None:
    for stream in streams_of(name):
        one, other = ends(CODECS[name](**values), stream=stream)
        for _ in range(2):
            x = torch.randn(shape)
            assert torch.equal(other.decode(stream, one.encode(stream, {"x": x}))["x"], x)


@pytest.mark.parametrize("name, most", LOSSES.items())
def test_so_much_is_lost_of_gaussian_values(name: str, most: float) -> None:
    x = torch.randn(16, 65, 96)
    assert most / 3 < (passed(x, CODECS[name]()) - x).norm() / x.norm() < most


@pytest.mark.parametrize("name", CODECS)
def test_a_million_values_and_values_of_all_sizes(name: str) -> None:
    stream = streams_of(name)[-1]
    for x in (torch.randn(1000, 1000), torch.tensor([[1e-30, -1e30, 0.0, 1e-42, 3e38]]), torch.zeros(5, 5)):
        one, other = ends(CODECS[name](), stream=stream)
        for _ in range(2):
            got = other.decode(stream, one.encode(stream, {"x": x}))["x"]
        assert torch.isfinite(got).all() and got.shape == x.shape
        assert x.any() or not got.any()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(name: str, value: float) -> None:
    if name == "zstd":  # it works on bytes
        return
    stream = streams_of(name)[0]
    with pytest.raises(FedsplitError, match=r"'x' .*not finite.*lower optimizer\.lr"):
        ends(CODECS[name](), stream=stream)[0].encode(stream, {"x": torch.tensor([1.0, value])})


def test_another_float_type_is_refused() -> None:
    with pytest.raises(FedsplitError, match="codecs take float32"):
        ends(CODECS["half"]())[0].encode(UP, {"x": torch.zeros(2, dtype=torch.float64)})


@pytest.mark.parametrize(
    "name, values",
    [("int8", {}), ("qsgd", {"levels": 3, "bucket": 16}), ("qsgd", {"levels": 2, "norm": "l2"})],
    ids=str,
)
def test_random_rounding_is_right_on_average(name: str, values: dict[str, Any]) -> None:
    """500 draws: a step's standard deviation is at most half of it, so the mean is within 5 such / sqrt(500)."""
    x, draws = torch.randn(4, 16), 500
    random = {"rounding": "stochastic"} if name == "int8" else {}
    one, other = ends(CODECS[name](**values, **random))
    mean = torch.stack([other.decode(UP, one.encode(UP, {"x": x}))["x"].double() for _ in range(draws)]).mean(0)
    step = {
        "int8": x.abs().amax(-1, keepdim=True) / 127,
        "qsgd": (x.norm() if values.get("norm") == "l2" else x.abs().amax(-1, keepdim=True)) / values.get("levels", 1),
    }[name]
    bound = 5 * step / 2 / math.sqrt(draws)
    assert ((mean - x).abs() <= bound).all()
    if name == "int8":
        assert not ((passed(x, CODECS["int8"]()) - x).abs() <= bound).all(), "rounding to the nearest is not"


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60), st.floats(0.01, 1.0), st.integers(1, 4))
def test_contraction(values: list[float], keep: float, rows: int) -> None:
    x = torch.tensor(values).repeat(rows).reshape(rows, -1)
    square = x.double().square().sum()
    for codec, share in (
        (CODECS["topk"](keep=keep), min(x.numel(), max(1, round(keep * x.numel()))) / x.numel()),
        (CODECS["token-topk"](keep=keep), min(len(values), max(1, round(keep * len(values)))) / len(values)),
        (CODECS["sign"](), 1 / x.numel()),
        (CODECS["sign"](scope="row"), 1 / len(values)),
    ):
        lost = (passed(x, codec).double() - x).square().sum()
        assert lost <= (1 - share) * square * (1 + 1e-5) + 1e-20


def test_int8_is_half_a_scale_off_at_most_and_each_token_has_its_own() -> None:
    x = torch.randn(3, 5, 40) * torch.tensor([1e-6, 1.0, 1e6]).reshape(3, 1, 1)
    scale = x.abs().amax(-1, keepdim=True) / 127
    assert ((passed(x, CODECS["int8"]()) - x).abs() <= 0.501 * scale).all()


def test_top_k_keeps_an_exact_count_and_the_first_of_equals() -> None:
    flat = passed(torch.ones(10), CODECS["topk"](keep=0.3))
    assert flat.tolist() == [1.0] * 3 + [0.0] * 7
    tokens = passed(torch.tensor([[1.0, -3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]]), CODECS["token-topk"](keep=0.5))
    assert tokens.tolist() == [[0.0, -3.0, 0.0, 3.0], [0.0] * 4]


@pytest.mark.parametrize(
    "size, keep, part, width", [(80, 0.5, "mask", 10), (6400, 0.01, "index", 128), (70_000, 1e-3, "index", 280)]
)
def test_positions_take_the_shorter_form(size: int, keep: float, part: str, width: int) -> None:
    _, side, _ = CODECS["topk"](keep=keep).encode(torch.randn(size), None, None)
    assert set(side) == {part, "shape"} and side[part].nbytes == width < (size if part == "mask" else size / 8)
    x = torch.randn(size)
    got = passed(x, CODECS["topk"](keep=keep))
    assert int((got != 0).sum()) == round(size * keep) and torch.equal(got[got != 0], x[got != 0])


def test_bytes_of_a_value() -> None:
    """The figures of docs/wire.md: bits a value of 1,000,000, side tensors and header counted."""
    x = {"x": torch.randn(1000, 1000)}
    bits = {
        name: 8 * len(Link({UP: [CODECS[name](**values)]}).encode(UP, x)) / 1e6
        for name, values in {
            "half": {},
            "int8": {},
            "topk": {"keep": 0.1},
            "sign": {},
            "qsgd": {},
            "recover": {},
        }.items()
    }
    expected = {"half": 16, "int8": 8.032, "topk": 4.2, "sign": 1, "qsgd": 4 + 32 / 512, "recover": 1 + 0.6 + 12.8}
    assert bits == pytest.approx(expected, abs=0.01)


def test_draws_depend_on_names_and_on_nothing_before() -> None:
    x, codec = {"x": torch.randn(50)}, CODECS["int8"](rounding="stochastic")
    first = Link({UP: [codec]}, seed=1, round=2, client=3)
    frames = [first.encode(UP, x) for _ in range(2)]
    again = Link({UP: [codec]}, seed=1, round=2, client=3)
    torch.rand(7)
    assert [again.encode(UP, x) for _ in range(2)] == frames and frames[0] != frames[1]
    for other in ({"seed": 2}, {"round": 3}, {"client": 4}):
        assert Link({UP: [codec]}, **({"seed": 1, "round": 2, "client": 3} | other)).encode(UP, x) != frames[0]


def test_orders_and_scores_beside_the_activations_arrive_as_they_are() -> None:
    order = Order(Plan(((2, 1), (0, 2)), (0.123, 1.7)), (2, 2))
    one, other = ends(CODECS["sign"]())
    got = other.decode(UP, one.encode(UP, {"x": torch.randn(2, 3, 4), **order.tensors()}))
    assert Order.read(got) == Order.read(order.tensors())


@given(st.integers(2, 8), st.lists(st.integers(0, 255), max_size=40))
def test_levels_are_packed_as_bits_in_a_row(bits: int, numbers: list[int]) -> None:
    levels = torch.tensor([n % 2**bits for n in numbers], dtype=torch.uint8)
    flags = [bool(n >> shift & 1) for n in levels.tolist() for shift in range(bits - 1, -1, -1)]
    packed = pack_levels(levels, bits)
    assert torch.equal(packed, pack_bits(torch.tensor(flags, dtype=torch.bool)))
    assert torch.equal(unpack_levels(packed, len(levels), bits), levels)
    for wrong in (torch.cat([packed, packed.new_zeros(1)]), packed.to(torch.int16)):
        with pytest.raises(FedsplitError, match="bytes are not"):
            unpack_levels(wrong, len(levels), bits)
    if len(levels) * bits % 8:
        packed[-1] |= 1
        with pytest.raises(FedsplitError, match="go on after their end"):
            unpack_levels(packed, len(levels), bits)


@given(st.integers(1, 5), st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.data())
def test_the_largest_are_those_of_a_stable_sort(tokens: int, numbers: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(numbers)))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.stack([torch.tensor(numbers, dtype=dtype).roll(k) for k in range(tokens)])
        wanted = torch.zeros_like(x, dtype=torch.bool)
        wanted.scatter_(1, x.abs().sort(dim=1, descending=True, stable=True).indices[:, :count], True)
        assert torch.equal(largest(x, count), wanted)


def test_values_that_are_not_finite_are_found_and_a_sum_that_is_not_is_no_proof() -> None:
    assert finite(torch.zeros(0)) and finite(torch.full((9,), 3e38)) and finite(torch.ones(3, dtype=torch.int64))
    for odd in (math.inf, -math.inf, math.nan):
        assert not finite(torch.tensor([1.0, odd])) and not finite(torch.tensor([math.inf, odd]))


def test_an_upload_of_differences_is_not_decoded_by_its_sender() -> None:
    down, up = (Link({s: [CODECS["delta"]()] for s in PARAMETERS}) for _ in range(2))
    for link, stream in ((down, "parameters-down"), (up, "parameters-up")):
        x = {"w": torch.arange(6.0)}
        if stream == "parameters-up":
            link.hold(stream, x)
        else:
            link.encode(stream, x)
        link.encode(stream, {"w": torch.ones(6)})
        assert bool(link.kept()) == (stream == "parameters-down"), "what went up is no reference of anything"
