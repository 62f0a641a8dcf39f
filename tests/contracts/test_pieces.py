"""Every piece of every registry keeps the contract of its place; every config builds and steps."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from covering import Piece, check_cover, covering, label, lists, together

from fedsplit.config import Config, keys, load, resolve
from fedsplit.control import CONTROLLERS, SCHEDULES
from fedsplit.data import SELECTORS
from fedsplit.experiment import start
from fedsplit.front import EDITS, PENALTIES
from fedsplit.places import PLACES
from fedsplit.round import run_round
from fedsplit.runtime.inprocess import Loop
from fedsplit.share import PARTIAL, PROXIMAL
from fedsplit.types import FedsplitError, Scalar
from fedsplit.wire import CODECS
from fedsplit.world import world

keys()  # registers what FEDSPLIT_PIECES names: your own piece under the contract of its place
PIECES = {(place.prefix, name): cls for place in PLACES for name, cls in place.pieces.items()}
CONFIGS = sorted(
    path for path in Path("configs").rglob("*.toml") if path.parts[1] not in ("pretrain", "devices", "studies")
)
TINY: dict[str, Scalar] = {
    "data.limit": 60,
    "data.test-limit": 20,
    "data.partition": "iid",
    "local.max-steps": 1,
    "local.batch-size": 8,
    "rounds": 1,
}
NANO: dict[str, Scalar] = {"model.name": "fedsplit_nano", "model.pretrained": False, "cut.front": 1}


@pytest.mark.parametrize("piece", PIECES, ids="/".join)
def test_a_piece_is_a_frozen_dataclass_with_a_five_line_docstring(piece: tuple[str, str]) -> None:
    cls = PIECES[piece]
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    text = inspect.getdoc(cls) or ""
    for word in ("Paper:", "Place:", "Off:", "Deviates:"):
        assert word in text, f"{cls.__name__} does not say '{word}'"
    for field in dataclasses.fields(cls):
        key = keys()[f"{piece[0]}.{piece[1]}.{field.name.replace('_', '-')}"]
        assert key.help and key.type in (int, float, bool, str)
    assert cls() == cls()


@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_keeps_something_and_is_decided_by_its_key(name: str) -> None:
    piece = SELECTORS[name](keep=0.5)
    samples = SimpleNamespace(labels=torch.arange(40) % 4, classes=4)
    samples.logits = samples.features = lambda: torch.randn(len(samples.labels), 4)
    scores = piece.score(samples)
    assert scores.shape == (40,) and scores.dtype == torch.float32 and scores.isfinite().all()
    for values in (scores, torch.zeros(40)):
        one, again, other = (piece.select(values, samples.labels, stream) for stream in (1, 1, 2))
        assert one.dtype == torch.bool and one.shape == (40,)
        assert torch.equal(one, again) and int(one.sum()) == piece.count(samples.labels) == 20
    assert not torch.equal(one, other), "equal scores are no order: the key decides"
    least = SELECTORS[name](keep=1e-9)
    for size in (0, 1, 2):
        labels = torch.zeros(size, dtype=torch.int64)
        assert int(least.select(torch.rand(size), labels, 0).sum()) == least.count(labels) == min(size, 1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_starts_at_one_and_stays_between_zero_and_one(name: str) -> None:
    piece = SCHEDULES[name]()
    factors = [piece.factor(number, 10) for number in range(1, 11)]
    assert factors[0] == 1.0 and all(0 <= factor <= 1 for factor in factors)
    assert piece.factor(1, 1) == 1.0


@pytest.mark.parametrize("name", PROXIMAL)
def test_a_proximal_piece_pulls_towards_the_anchor(name: str) -> None:
    piece = PROXIMAL[name]()
    w = torch.tensor([2.0, -1.0])
    assert torch.equal(piece.gradient(w, w), torch.zeros(2))
    assert (piece.gradient(w, torch.zeros(2)) * w > 0).all()


@pytest.mark.parametrize("name", PARTIAL)
def test_a_partial_piece_shares_blocks_that_there_are(name: str) -> None:
    piece = PARTIAL[name]()
    assert piece.head in ("shared", "personal") and piece.uses_gradients in (True, False)
    for blocks in ([], [5], [0, 1, 6, 7]):
        importance = torch.rand(len(blocks), dtype=torch.float64)
        shared = piece.shared(importance, blocks, 8)
        assert set(shared) <= set(blocks) and set(shared) == set(piece.shared(importance, blocks, 8))


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_config_builds_and_takes_one_step(path: Path) -> None:
    config = load([path])
    config = config.replace(**{key.replace(".", "__").replace("-", "_"): value for key, value in TINY.items()})
    step(config.replace(devices__count=min(2, config.devices.count or 2), devices__per_round=0))


# Streams know nothing of each other, and tests/wire chains codecs: here each stands on one stream.
WIRE = {
    "wire.activations-up": ("token-topk", "int8"),
    "wire.activations-down": ("bfloat16", "zstd"),
    "wire.gradients-up": ("qsgd",),
    "wire.gradients-down": ("sign", "half"),
    "wire.parameters-up": ("delta", "feedback", "topk"),
    "wire.parameters-down": ("recover",),
}
# Pieces that decide who takes part meet no other piece: tests/test_devices.py.
EVERYTHING = [
    (place.key, name) for place in PLACES for name in WIRE.get(place.key, place.pieces) if place.prefix != "devices"
]
# Pieces that are refused together, and why; of three or more, all pairs still run.
APART: dict[frozenset[Piece], str] = {}
SETS = covering(EVERYTHING, APART)


@pytest.mark.slow
@pytest.mark.parametrize("pieces", SETS, ids=label)
def test_every_pair_of_pieces_runs(pieces: tuple[Piece, ...]) -> None:
    together(pieces, lambda some: step(resolve({**TINY, "devices.count": 1, "train": "head,biases", **lists(some)})))


def test_each_codec_stands_in_a_run() -> None:
    assert {name for names in WIRE.values() for name in names} == set(CODECS)


def test_the_sets_of_pieces_hold_every_pair() -> None:
    check_cover(EVERYTHING, APART, SETS)


# Whether the order of two pieces in one list matters, by list key and names: filled as lists grow.
COMMUTE: dict[tuple[str, str, str], bool] = {
    ("data.select", *pair): True  # masks combine by 'and'
    for pair in combinations(("el2n", "el2n-balanced", "entropy", "loss", "prototype", "random"), 2)
} | {("body.plans", "knapsack", "layerdrop"): True}  # plans combine by minimum
COMMUTE |= {  # guards act in the order of the list, on whatever prompts there are
    ("front.edits", *pair): "prompts" in pair or pair == ("quantize", "shuffle")
    for pair in combinations(sorted(EDITS), 2)
}
COMMUTE |= {("front.penalties", *pair): True for pair in combinations(sorted(PENALTIES), 2)}  # a sum
COMMUTE[("front.penalties", "linear-adversary", "nopeek")] = False  # of gradients, three in float32
COMMUTE |= {  # each sets keys of its own; the two that share one are refused when a run starts
    ("control.tune", *pair): True for pair in combinations(sorted(CONTROLLERS), 2)
}


def test_the_table_says_which_pairs_commute() -> None:
    pairs = {
        (place.key, *names)
        for place in PLACES
        if not place.single and place.prefix != "wire"  # tests/wire/test_chains.py says it of codecs
        for names in combinations(sorted(place.pieces), 2)
    }
    assert set(COMMUTE) == pairs, "say in COMMUTE whether the order of two pieces of one list matters"
    for key, one, other in pairs:
        models = []
        least = {} if key.startswith("body.") else NANO  # there are many, and only plans need depth
        for names in (f"{one},{other}", f"{other},{one}"):
            config = resolve({**TINY, **least, "devices.count": 1, key: names})
            built = world(config)
            models.append(run_round(built, start(built), 0, Loop(config), lambda _: None).state.model)
        same = all(torch.equal(models[0][name], models[1][name]) for name in models[0])
        assert same == COMMUTE[key, one, other], (key, one, other)


def step(config: Config) -> None:
    built = world(config)
    state = start(built)
    outcome = run_round(built, state, 0, Loop(config), lambda _: None)
    assert outcome.enough and not outcome.failures
    moved = [name for name in state.model if not torch.equal(state.model[name], outcome.state.model[name])]
    assert moved and all(torch.isfinite(value).all() for value in outcome.state.model.values())


def test_keys_have_help_types_and_defaults_within_their_range() -> None:
    for key in keys().values():
        assert key.help and type(key.default) is key.type
        assert key.name == key.name.lower() and "_" not in key.name
        resolve({key.name: key.default})


def test_core_imports_neither_flwr_nor_ray() -> None:
    code = (
        "import sys, fedsplit.cli.main, fedsplit.experiment, fedsplit.runtime.inprocess, fedsplit.places;"
        "sys.exit(any(m.split('.')[0] in ('flwr', 'ray') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_piece_with_a_key_of_its_own_is_one_file_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CONTRIBUTING promises: the key exists, is checked, and the piece runs."""
    import fedsplit.wire
    from fedsplit.config import keys as known

    source: dict[str, object] = {}
    exec(compile(_walk_through(), "clip.py", "exec"), source)
    monkeypatch.setitem(fedsplit.wire.CODECS, "clip", source["Clip"])
    known.cache_clear()
    try:
        config = resolve({**TINY, "devices.count": 1, "wire.activations-up": "clip,half", "wire.clip.limit": 0.5})
        assert config.pieces("wire.activations-up")[0].limit == 0.5
        step(config)
        with pytest.raises(FedsplitError, match=r"wire\.clip\.limit must be at least 0"):
            resolve({"wire.clip.limit": -1.0})
    finally:
        known.cache_clear()


def _walk_through() -> str:
    """The piece of CONTRIBUTING's walk-through: its first Python block."""
    return Path("CONTRIBUTING.md").read_text().split("```python\n")[1].split("```")[0]
