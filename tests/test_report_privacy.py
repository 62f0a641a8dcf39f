"""What reports draw of privacy: who beats whom, and what crosses the cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedsplit.config import resolve
from fedsplit.experiment import run
from fedsplit.report import Absent, figures, load
from fedsplit.report.figures.crossing import components
from fedsplit.report.figures.tradeoff import Point, drawn, unbeaten
from fedsplit.runtime.inprocess import runner

SMALL = {
    "model.name": "fedsplit_nano",
    "model.pretrained": False,
    "rounds": 1,
    "data.limit": 40,
    "data.test-limit": 20,
    "devices.count": 1,
    "data.partition": "iid",
    "local.max-steps": 1,
}


def test_a_point_is_unbeaten_unless_another_is_as_good_in_all_and_better_in_one() -> None:
    points = [
        Point("a", "1", 0.9, 0.8, 10.0),
        Point("b", "1", 0.9, 0.8, 11.0),  # as a, for more work
        Point("c", "1", 0.5, 0.3, 10.0),  # safer
        Point("d", "1", 0.5, 0.3, 10.0),  # the same as c
        Point("e", "1", 0.4, 0.9, 5.0),  # cheaper
    ]
    assert unbeaten(points) == [True, False, True, True, True]


def test_the_picture_says_in_words_what_it_shows() -> None:
    made = drawn([Point("noise", "2", 0.5, 0.25, 1e9), Point("no defence", "2", 0.6, 0.9, 1e9)])
    assert "noise 2: 50.0 % at 0.25" in made.alt and "no defence 2: 60.0 % at 0.90" in made.alt
    assert [text.get_text() for text in made.legends[0].get_texts()] == ["noise", "no defence"]


def test_components_are_the_directions_of_largest_spread_and_stay_within_zero_and_one() -> None:
    draw = np.random.default_rng(0)
    tokens = draw.normal(size=(4, 9, 16)) * 0.01
    tokens[..., 5] += np.arange(36).reshape(4, 9)
    found = components(tokens)
    assert found.shape == (4, 9, 3) and found.min() >= 0 and found.max() <= 1
    first = found[..., 0].reshape(-1)
    assert (np.diff(first) >= -1e-9).all(), "the first follows the channel that spreads most"
    assert components(np.ones((1, 4, 2))).shape == (1, 4, 3)


@pytest.mark.parametrize(("tail", "rows"), [(0, 3), (1, 4)])  # a tail without blocks reads the mean of all patches
def test_what_crosses_has_a_row_of_images_and_rows_of_tokens(tail: int, rows: int, tmp_path: Path) -> None:
    config = resolve({**SMALL, "cut.front": 1, "cut.tail": tail, "out": str(tmp_path / "run")})
    folder = run(config, runner(config))
    made = figures.crossing(load(folder), count=3)
    assert len(made.axes) == rows * 3 and "their size" in made.alt
    assert ("gradients up" in made.alt) is (rows == 4)
    with pytest.raises(Absent, match="No run was audited"):
        figures.tradeoff(load(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(Absent, match="the run has not ended"):
        figures.crossing(load(folder))
