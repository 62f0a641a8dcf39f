"""Frames, links, the gate and the tap."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.share.gate import Refused, admit
from fedsplit.types import FedsplitError, Report, Tensors, Update
from fedsplit.wire.frame import pack, unpack
from fedsplit.wire.link import Link


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@given(
    st.lists(st.integers(0, 5), max_size=3), st.sampled_from([torch.float32, torch.float16, torch.int64, torch.uint8])
)
def test_a_frame_gives_back_what_it_got(shape: list[int], dtype: torch.dtype) -> None:
    tensors = {"a": (torch.randn(shape) * 10).to(dtype), "b.c": torch.arange(3)}
    got = unpack(pack(tensors))
    assert same(got, tensors) and all(got[k].dtype == tensors[k].dtype for k in got)


def test_an_empty_frame_is_empty() -> None:
    assert pack({}) == b"" and unpack(b"") == {}


@given(st.binary(min_size=1, max_size=200))
def test_garbage_is_refused_not_executed(garbage: bytes) -> None:
    with pytest.raises(FedsplitError, match="not a frame"):
        unpack(garbage)


def test_a_truncated_frame_is_refused() -> None:
    frame = pack({"x": torch.randn(10)})
    with pytest.raises(FedsplitError, match="not a frame"):
        unpack(frame[:-4])


def test_both_ends_count_the_frame_and_the_tap_sees_what_arrived() -> None:
    seen: list[tuple[str, Tensors]] = []
    client, server = Link({}), Link({}, tap=lambda stream, tensors: seen.append((stream, tensors)))
    x = {"x": torch.randn(2, 5, 8)}
    frame = client.encode("activations-up", x)
    assert same(server.decode("activations-up", frame), x)
    assert client.sizes["activations-up"] == server.sizes["activations-up"] == len(frame) > 2 * 5 * 8 * 4
    assert seen[0][0] == "activations-up" and same(seen[0][1], x)


def test_decoded_tensors_own_their_memory() -> None:
    link, x = Link({}), torch.zeros(4)
    got = link.decode("activations-up", link.encode("activations-up", {"x": x}))["x"]
    got += 1
    assert torch.equal(x, torch.zeros(4))


EXPECTED = {"w": torch.zeros(2, 3)}


def admitted(up: bytes, *, samples: object = 5, server: bytes = b"", limit: int = 10_000) -> tuple[Tensors, ...]:
    update = Update(0, samples, up, server, Report())  # type: ignore[arg-type]
    return admit(update, Link({}), EXPECTED, {"s": torch.zeros(1)} if server else {}, limit)


def test_an_honest_update_is_let_in() -> None:
    good = {"w": torch.ones(2, 3)}
    assert same(admitted(pack(good))[0], good)
    state = {"s": torch.ones(1), "s|momentum_buffer": torch.ones(1)}
    assert same(admitted(pack(good), server=pack(state))[1], state)


@pytest.mark.parametrize(
    "tensors, reason",
    [
        ({"w": torch.full((2, 3), float("nan"))}, "not finite"),
        ({"w": torch.full((2, 3), float("inf"))}, "not finite"),
        ({"w": torch.zeros(3)}, "instead of"),
        ({"w": torch.zeros(2, 3, dtype=torch.float64)}, "float64"),
        ({"v": torch.zeros(2, 3)}, "was not asked for"),
        ({}, "lacks parameter"),
        ({"w": torch.zeros(2, 3), "extra": torch.zeros(1)}, "was not asked for"),
    ],
)
def test_what_the_gate_refuses(tensors: Tensors, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        admitted(pack(tensors))


@pytest.mark.parametrize("samples", [0, -3, True, 2.5, None, "7"])
def test_sample_counts_that_cannot_be(samples: object) -> None:
    with pytest.raises(Refused, match="samples"):
        admitted(pack(dict(EXPECTED)), samples=samples)


def test_too_large_and_malformed_updates() -> None:
    with pytest.raises(Refused, match="over the limit"):
        admitted(pack({"w": torch.zeros(10_000)}))
    with pytest.raises(Refused, match="not a frame"):
        admitted(b"\x00" * 64)
    with pytest.raises(Refused, match="not finite"):
        admitted(pack(dict(EXPECTED)), server=pack({"s": torch.full((1,), float("nan"))}))


def test_labels_and_images_never_reach_the_server_of_a_u_shape() -> None:
    from fedsplit.client import client_round
    from fedsplit.config import resolve
    from fedsplit.experiment import start
    from fedsplit.types import Job
    from fedsplit.world import world

    values = {
        "data.limit": 60,
        "data.test-limit": 20,
        "data.partition": "iid",
        "devices.count": 1,
        "local.max-steps": 2,
        "local.batch-size": 8,
    }
    seen: dict[str, list[Tensors]] = {}
    for shape in ("u-shape", "vanilla"):
        built = world(resolve({**values, "cut.shape": shape}))
        model = start(built).model
        frames = (pack({name: model[name] for name in side}) for side in (built.client, built.server))
        taken: list[tuple[str, Tensors]] = []
        client_round(built, Job(0, 1, 0, *frames), tap=lambda stream, x, taken=taken: taken.append((stream, x)))
        seen[shape] = [tensors for _, tensors in taken]
        assert {stream for stream, _ in taken} <= {"activations-up", "gradients-up"}
    assert all(set(tensors) == {"x"} and tensors["x"].shape == (8, 64, 96) for tensors in seen["u-shape"])
    assert all(set(tensors) == {"x", "labels"} for tensors in seen["vanilla"])
