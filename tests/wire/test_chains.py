"""Codecs after one another: which lists there may be, what each stage sees, and which orders matter."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor

from fedsplit.config import resolve
from fedsplit.experiment import check
from fedsplit.types import STREAMS, FedsplitError, Stream
from fedsplit.wire import CODECS, chain
from fedsplit.wire.link import Link
from fedsplit.world import ghost

DOWN: Stream = "parameters-down"


def through(names: tuple[str, ...], x: Tensor, stream: Stream = DOWN) -> tuple[Tensor, int]:
    """The second message, when codecs that remember do."""
    codecs = {stream: [CODECS[name]() for name in names]}
    chain.check(codecs)
    one, other = Link(codecs), Link(codecs)
    other.decode(stream, one.encode(stream, {"x": 0.9 * x}))
    frame = one.encode(stream, {"x": x})
    return other.decode(stream, frame)["x"], len(frame)


# Pairs of which one order or both are refused: (the order that runs, if any).
REFUSED = {
    **{frozenset((name, "zstd")): (name, "zstd") for name in CODECS if name != "zstd"},
    **{frozenset((first, name)): (first, name) for first in ("delta", "feedback") for name in CODECS if name != "zstd"},
    **{frozenset(pair): None for pair in (("delta", "feedback"), ("delta", "recover"), ("feedback", "recover"))},
}
# Pairs that give the same values either way, as long as rounding makes no two values equal and no token has more of
# the largest values than it may keep.
COMMUTE = {frozenset(pair) for pair in combinations(("topk", "token-topk", "half", "bfloat16"), 2)}
COMMUTE -= {frozenset(("half", "bfloat16"))}


@pytest.mark.parametrize("pair", list(combinations(CODECS, 2)), ids=",".join)
def test_every_pair_runs_or_is_refused_and_the_table_says_which_commute(pair: tuple[str, str]) -> None:
    torch.manual_seed(1)
    x = torch.randn(8, 24)
    found = []
    for names in permutations(pair):
        if frozenset(pair) in REFUSED and names != REFUSED[frozenset(pair)]:
            with pytest.raises(FedsplitError, match=f"wire.{DOWN}: "):
                through(names, x)
        else:
            got, _ = through(names, x)
            assert got.shape == x.shape and torch.isfinite(got).all()
            found.append(got)
    if len(found) == 2:
        assert torch.equal(*found) == (frozenset(pair) in COMMUTE), pair


def test_a_stage_sees_what_the_one_before_kept() -> None:
    x = torch.randn(40, 50)
    codecs = {"activations-up": [CODECS["topk"](keep=0.1), CODECS["int8"]()]}
    frame = Link(codecs).encode("activations-up", {"x": x})
    assert len(frame) < 200 + 250 + 400 + 4, "a bitmap, a byte a kept value, one scale"
    got = Link(codecs).decode("activations-up", frame)["x"]
    kept = x.abs() >= x.abs().flatten().sort(descending=True).values[199]
    assert torch.equal(got != 0, kept) and torch.allclose(got[kept], x[kept], atol=float(x.abs().max()) / 250)


def test_tokens_keep_their_scales_after_token_topk() -> None:
    x = torch.randn(3, 16) * torch.tensor([1e-4, 1.0, 1e4]).unsqueeze(-1)
    codecs = {"activations-up": [CODECS["token-topk"](keep=0.5), CODECS["int8"]()]}
    got = Link(codecs).decode("activations-up", Link(codecs).encode("activations-up", {"x": x}))["x"]
    assert ((got != 0).sum(-1) == 8).all()
    kept = got != 0
    assert torch.allclose(got[kept], x[kept], rtol=0.05)


def test_what_recover_sends_exactly_passes_the_stages_behind_it() -> None:
    codecs = {DOWN: [CODECS["recover"](keep=0.4), CODECS["int8"]()]}
    one, other = Link(codecs), Link(codecs)
    tensors = {"norm.bias": torch.randn(30), "cls_token": torch.randn(1, 1, 8), "fc.weight": torch.randn(30, 30)}
    first = other.decode(DOWN, one.encode(DOWN, tensors))
    assert all(torch.equal(first[name], tensors[name]) for name in tensors), "the first time all of it"
    later = other.decode(DOWN, one.encode(DOWN, tensors))
    assert [torch.equal(later[name], tensors[name]) for name in tensors] == [True, True, False]


@pytest.mark.parametrize(
    "key, names, sentence",
    [
        ("activations-up", "zstd,int8", "zstd works on bytes; name it last"),
        ("gradients-down", "feedback,topk", "feedback goes on from the last value .* name it on parameters only"),
        ("activations-down", "delta", "delta goes on from the last value"),
        ("parameters-up", "topk,delta", "delta must see the tensor; name it first"),
        ("parameters-up", "half,feedback,topk", "feedback must see the tensor"),
        ("parameters-down", "delta,feedback,topk", "delta sends again what was lost, so leave feedback out"),
        ("parameters-down", "feedback,recover", "feedback must know .* recover .* leave one of them out"),
    ],
)
def test_a_list_that_cannot_work_is_refused(key: str, names: str, sentence: str) -> None:
    codecs = {key: [CODECS[name]() for name in names.split(",")]}
    with pytest.raises(FedsplitError, match=f"wire.{key}: {sentence}"):
        chain.check(codecs)  # type: ignore[arg-type]


def test_it_is_refused_at_the_start_of_a_run() -> None:
    config = resolve({"data.limit": 60, "data.test-limit": 20, "data.partition": "iid", "wire.gradients-up": "delta"})
    with pytest.raises(FedsplitError, match=r"wire\.gradients-up: delta goes on"):
        check(config, ghost(config))


def test_all_six_streams_take_every_codec_that_they_may() -> None:
    for stream in STREAMS:
        for name in CODECS:
            if stream in ("parameters-up", DOWN) or name not in ("delta", "feedback"):
                assert through((name,), torch.randn(4, 6), stream)[0].shape == (4, 6)
