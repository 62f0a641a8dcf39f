from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from fedsplit.data.batches import augment, batches, to_batch
from fedsplit.types import Images


def some(count: int = 64, side: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_an_epoch_visits_every_sample_once():
    mine = np.arange(100, 170)
    made = list(batches(mine, 32, 5))
    assert [len(part) for part in made] == [32, 32, 6]
    assert np.array_equal(np.sort(np.concatenate(made)), mine) and not np.array_equal(np.concatenate(made), mine)
    assert list(batches(mine[:0], 32, 5)) == []


def test_the_stream_decides_the_order():
    first, same, other = (np.concatenate(list(batches(np.arange(50), 8, stream))) for stream in (1, 1, 2))
    assert np.array_equal(first, same) and not np.array_equal(first, other)


def test_none_is_the_input_itself():
    x = some()
    assert augment(x, "none", 3) is x


def test_flip_mirrors_about_half():
    x = some(400)
    y = augment(x, "flip", 3)
    same = (y == x).flatten(1).all(1)
    mirrored = (y == x.flip(-1)).flatten(1).all(1)
    assert bool((same ^ mirrored).all()) and 150 < int(mirrored.sum()) < 250
    assert y.dtype == torch.uint8 and y.is_contiguous()


def test_crop_is_a_window_of_the_reflected_image():
    x = some(200)
    y = augment(x, "crop-flip", 3)
    padded = torch.nn.functional.pad(x.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    shifts = set()
    for before, after in zip(padded, y, strict=True):
        found = [
            (row, column, flip)
            for row in range(5)
            for column in range(5)
            for flip in (False, True)
            if torch.equal(after.flip(-1) if flip else after, before[:, row : row + 16, column : column + 16])
        ]
        assert len(found) == 1
        shifts.add(found[0])
    assert len(shifts) > 40  # of 50


def test_augment_is_a_function_of_its_stream():
    x = some()
    assert torch.equal(augment(x, "crop-flip", 1), augment(x, "crop-flip", 1))
    assert not torch.equal(augment(x, "crop-flip", 1), augment(x, "crop-flip", 2))


def test_a_tiny_image_is_not_cropped():
    x = some(20, side=4)
    assert torch.equal(augment(x, "crop-flip", 1), augment(x, "flip", 1))


@pytest.fixture
def images() -> Images:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    pixels.setflags(write=False)
    return Images(pixels, np.arange(30) % 4)


def test_to_batch(images: Images):
    idx = np.array([7, 3, 21])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns about read-only arrays
        half = to_batch(images, idx, (0.5,) * 3, (0.5,) * 3, "none", 0, "cpu")
    pixels = torch.tensor(images.pixels[idx]).permute(0, 3, 1, 2)
    assert half.x.shape == (3, 3, 8, 8) and half.x.dtype == torch.float32 and half.x.is_contiguous()
    assert (half.x - (pixels / 127.5 - 1)).abs().max() < 1e-6
    assert half.y.tolist() == [3, 3, 1] and half.y.dtype == torch.int64
    assert half.ids.tolist() == [7, 3, 21] and half.ids.dtype == torch.int64


def test_mean_and_std_go_by_channel(images: Images):
    batch = to_batch(images, np.arange(30), (0.1, 0.2, 0.3), (1.0, 2.0, 4.0), "none", 0, "cpu")
    pixels = torch.tensor(images.pixels).permute(0, 3, 1, 2) / 255
    for channel, (mean, std) in enumerate(((0.1, 1.0), (0.2, 2.0), (0.3, 4.0))):
        assert (batch.x[:, channel] - (pixels[:, channel] - mean) / std).abs().max() < 1e-6


def test_to_batch_augments_by_its_stream(images: Images):
    idx = np.arange(30)
    one, same, other = (to_batch(images, idx, (0.5,) * 3, (0.5,) * 3, "flip", s, "cpu").x for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
