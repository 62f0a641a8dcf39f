"""Sample selectors: scores against their definitions, and which samples are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsplit import choose
from fedsplit.config import keys, load, resolve
from fedsplit.data import SELECTORS
from fedsplit.data.selection import BalancedEl2n, El2n, Entropy, Loss, Prototype, Random
from fedsplit.types import FedsplitError

BANDS = [name for name in SELECTORS if name != "random"]


@dataclass
class Known:
    """Samples of known logits and features."""

    labels: Tensor
    classes: int
    outputs: Tensor

    def logits(self) -> Tensor:
        return self.outputs

    def features(self) -> Tensor:
        return self.outputs


@pytest.fixture
def samples() -> Known:
    return Known(torch.randint(7, (50,)), 7, 4 * torch.randn(50, 7))


def softmax(logits: Tensor) -> np.ndarray:
    exponents = np.exp(logits.numpy().astype(np.float64))
    return exponents / exponents.sum(axis=1, keepdims=True)


def test_el2n_is_the_norm_of_the_error(samples: Known) -> None:
    error = softmax(samples.outputs)
    error[np.arange(50), samples.labels.numpy()] -= 1
    expected = np.sqrt((error**2).sum(axis=1))
    for piece in (El2n(), BalancedEl2n()):
        np.testing.assert_allclose(piece.score(samples).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_entropy_is_that_of_the_tempered_softmax(samples: Known, temperature: float) -> None:
    p = softmax(samples.outputs / temperature)
    expected = -(p * np.log(p)).sum(axis=1)
    np.testing.assert_allclose(Entropy(temperature=temperature).score(samples).numpy(), expected, rtol=1e-3, atol=1e-6)


def test_entropy_of_a_certain_model_is_zero() -> None:
    certain = Known(torch.tensor([0, 1]), 2, torch.tensor([[1e4, 0.0], [0.0, 0.0]]))
    assert Entropy().score(certain).tolist() == pytest.approx([0.0, np.log(2)])


def test_loss_is_the_cross_entropy(samples: Known) -> None:
    expected = -np.log(softmax(samples.outputs)[np.arange(50), samples.labels.numpy()])
    np.testing.assert_allclose(Loss().score(samples).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_prototype_scores_by_the_distance_to_the_class_mean() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 5.0], [0.0, 2.0], [0.0, 2.0]])
    known = Known(torch.tensor([0, 0, 0, 1, 1]), 3, features)
    centre = np.array([2, 1]) / np.sqrt(5)  # the three of class 0 count alike, whatever their length
    far, near = np.linalg.norm([0, 1] - centre), np.linalg.norm([1, 0] - centre)
    assert Prototype().score(known).tolist() == pytest.approx([-near, -near, -far, 0.0, 0.0], abs=1e-6)


def test_prototype_leaves_out_the_outlier_and_keeps_rare_classes_whole() -> None:
    labels = torch.tensor([0] * 20 + [1] * 8 + [2] * 2)
    features = torch.nn.functional.one_hot(labels, 3) + 0.01 * torch.rand(30, 3)
    features[5] = torch.tensor([0.0, 1.0, 0.0])  # of class 0, looks like class 1
    known = Known(labels, 3, features)
    piece = Prototype(keep=0.5)
    mask = piece.select(piece.score(known), labels, 0)
    assert torch.bincount(labels[mask]).tolist() == [7, 6, 2] and not mask[5]
    assert Prototype(keep=0.01).count(labels) == 3, "one of each class"


def test_the_highest_scores_are_kept_and_offset_leaves_out_the_very_highest() -> None:
    scores = torch.linspace(0, 1, 20)[torch.randperm(20)]
    labels = torch.zeros(20, dtype=torch.int64)
    noisy = scores > 0.8  # the four highest are wrong labels
    plain, guarded = (El2n(keep=0.25, offset=offset).select(scores, labels, 0) for offset in (0.0, 0.2))
    assert plain[noisy].all() and not guarded[noisy].any()
    assert sorted(scores[guarded].tolist()) == scores.sort(descending=True).values[4:9].tolist()[::-1]


def test_el2n_leaves_out_flipped_labels_by_its_offset() -> None:
    truth = torch.arange(40) % 4
    labels = truth.clone()
    labels[:4] = (truth[:4] + 1) % 4
    known = Known(labels, 4, 5.0 * torch.nn.functional.one_hot(truth, 4) + torch.rand(40, 4))
    kept = [piece.select(piece.score(known), labels, 3) for piece in (El2n(), El2n(offset=0.1))]
    assert kept[0][:4].all() and not kept[1][:4].any()


def test_balanced_el2n_keeps_every_class() -> None:
    labels = torch.tensor([0] * 30 + [1] * 10 + [2])
    scores = torch.cat([torch.ones(30), torch.rand(10) / 2, torch.zeros(1)])
    assert set(labels[El2n(keep=0.2).select(scores, labels, 0)].tolist()) == {0}
    mask = BalancedEl2n(keep=0.2).select(scores, labels, 0)
    assert torch.bincount(labels[mask]).tolist() == [6, 2, 1]
    assert scores[mask & (labels == 1)].min() >= scores[~mask & (labels == 1)].max()


@pytest.mark.parametrize("name", SELECTORS)
def test_samples_seen_in_inference_mode(name: str) -> None:
    with torch.inference_mode():
        known = Known(torch.arange(12) % 3, 3, torch.randn(12, 3))
    piece = SELECTORS[name]()
    scores = torch.stack([piece.score(known), piece.score(known)]).mean(0)
    assert int(piece.select(scores, known.labels, 0).sum()) == piece.count(known.labels) == 6


@pytest.mark.parametrize("name", SELECTORS)
def test_one_sample_and_one_class(name: str) -> None:
    one = Known(torch.tensor([2]), 4, torch.randn(1, 4))
    none = Known(torch.zeros(0, dtype=torch.int64), 4, torch.zeros(0, 4))
    same = Known(torch.full((9,), 2), 4, torch.randn(9, 4))
    for keep in (1e-6, 0.5, 1.0):
        piece = SELECTORS[name](keep=keep)
        assert piece.select(piece.score(one), one.labels, 0).tolist() == [True]
        assert piece.score(none).shape == (0,) and piece.select(piece.score(none), none.labels, 0).shape == (0,)
        assert int(piece.select(piece.score(same), same.labels, 0).sum()) == max(1, round(9 * keep))


@pytest.mark.parametrize("name", BANDS)
def test_the_last_sample_survives_any_offset(name: str) -> None:
    piece = SELECTORS[name](keep=1e-3, offset=0.999)
    for size in (1, 2, 5):
        assert int(piece.select(torch.rand(size), torch.zeros(size, dtype=torch.int64), 0).sum()) == 1


@pytest.mark.parametrize("name", SELECTORS)
def test_equal_scores_do_not_favour_the_first_samples(name: str) -> None:
    piece = SELECTORS[name](keep=0.25)
    labels, scores = torch.zeros(8, dtype=torch.int64), torch.zeros(8)
    kept = torch.stack([piece.select(scores, labels, key) for key in range(400)]).float().mean(dim=0)
    assert (kept - 0.25).abs().max() < 0.1


def test_ties_at_the_edge_of_the_band_only() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0, 1.0, 0.0])
    masks = {tuple(choose.band(scores, 3, 0.0, key).tolist()) for key in range(50)}
    assert len(masks) == 3 and all(mask[0] and mask[2] and not mask[5] for mask in masks)


def test_nan_ranks_last_and_infinity_where_it_belongs() -> None:
    scores = torch.tensor([torch.nan, -1.0, torch.inf, -torch.inf, 2.0])
    assert choose.ranked(scores, 0)[:3].tolist() == [2, 4, 1]
    assert choose.band(scores, 3, 0.0, 7).tolist() == [False, True, True, False, True]
    broken = torch.full((6,), torch.nan)
    assert int(choose.band(broken, 2, 0.0, 1).sum()) == 2
    assert torch.equal(choose.band(broken, 2, 0.0, 1), choose.band(broken, 2, 0.0, 1))


SCORES = st.floats(width=32)


@pytest.mark.parametrize("name", SELECTORS)
@given(
    held=st.lists(st.tuples(st.integers(0, 4), SCORES), max_size=40),
    keep=st.floats(0, 1, exclude_min=True),
    offset=st.floats(0, 1, exclude_max=True),
    key=st.integers(0, 2**63 - 1),
)
def test_count_says_how_many_are_kept(
    name: str, held: list[tuple[int, float]], keep: float, offset: float, key: int
) -> None:
    more = {"offset": min(offset, 1 - keep)} if name in BANDS else {}
    piece = SELECTORS[name](keep=keep, **more)
    labels = torch.tensor([label for label, _ in held], dtype=torch.int64)
    scores = torch.tensor([score for _, score in held])
    mask = piece.select(scores, labels, key)
    assert int(mask.sum()) == piece.count(labels)
    assert bool(mask.any()) == bool(held)
    assert torch.equal(mask, piece.select(scores, labels, key))
    assert SELECTORS[name](keep=1.0).select(scores, labels, key).all()


@given(st.dictionaries(st.integers(0, 9), st.integers(1, 30), min_size=1), st.data())
def test_even_shares_are_even_and_add_up(sizes: dict[int, int], data: st.DataObject) -> None:
    total = data.draw(st.integers(len(sizes), sum(sizes.values())))
    shares = choose.even_shares(sizes, total)
    assert sum(shares.values()) == total and all(1 <= shares[group] <= sizes[group] for group in sizes)
    short = [shares[group] for group in sizes if shares[group] < sizes[group]]
    assert not short or min(short) >= max(shares.values()) - 1


def test_random_keeps_another_half_each_round() -> None:
    labels = torch.zeros(40, dtype=torch.int64)
    masks = [Random().select(torch.arange(40.0), labels, key) for key in range(2)]
    assert not torch.equal(*masks) and not Random.scores_model and El2n.scores_model


REFUSED = [
    ({"data.el2n.keep": 0}, "data.el2n.keep must be more than 0, got 0"),
    ({"data.random.keep": 1.5}, "data.random.keep must be at most 1, got 1.5"),
    ({"data.entropy.temperature": 0.0}, "data.entropy.temperature must be more than 0"),
    ({"data.loss.epochs": 0}, "data.loss.epochs must be at least 1"),
    ({"data.prototype.offset": -0.1}, "data.prototype.offset must be at least 0"),
    ({"data.random.offset": 0.1}, "Unknown config key 'data.random.offset'"),
]


@pytest.mark.parametrize(("values", "sentence"), REFUSED)
def test_refused(values: dict[str, float], sentence: str) -> None:
    with pytest.raises(FedsplitError, match=sentence):
        resolve(values)


@pytest.mark.parametrize("name", BANDS)
def test_a_band_beyond_the_last_sample_is_refused(name: str) -> None:
    values = {f"data.{name}.keep": 0.7, f"data.{name}.offset": 0.4}
    with pytest.raises(FedsplitError) as error:
        resolve({"data.select": f"random,{name}", **values})
    assert str(error.value) == f"data.{name}: keep=0.7 and offset=0.4 must add up to at most 1, got 1.1."
    resolve(values)  # nobody asked for the selector
    resolve({"data.select": name, f"data.{name}.keep": 0.7, f"data.{name}.offset": 0.3})


def test_every_selector_has_its_keys_in_files_too(tmp_path: Path) -> None:
    for name in SELECTORS:
        fields = {"keep": 0.5, "once": False} | ({"offset": 0.0, "epochs": 1} if name in BANDS else {})
        fields |= {"temperature": 1.0} if name == "entropy" else {}
        found = {key: value for key, value in keys().items() if key.startswith(f"data.{name}.")}
        assert {key.rpartition(".")[2]: value.default for key, value in found.items()} == fields
    (tmp_path / "a.toml").write_text('data.select = "el2n-balanced"\n[data.el2n-balanced]\nkeep = 0.25\nonce = true\n')
    config = load([tmp_path / "a.toml"], ["data.el2n-balanced.offset=0.125"])
    assert config.pieces("data.select") == [BalancedEl2n(keep=0.25, once=True, offset=0.125)]
