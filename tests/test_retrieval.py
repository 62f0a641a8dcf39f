"""Retrieval: hand-made rankings, and the study on a run of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "data"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "simulations"))

import retrieval
from picture_files import pictures, write_split

from fedsplit.cli.main import main
from fedsplit.metrics.retrieval import retrieve


def test_a_ranking_by_hand() -> None:
    query = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    gallery = torch.tensor([[3.0, 0.1], [1.0, 0.5], [0.2, 1.0], [-1.0, 0.0]])
    found = retrieve(query, torch.tensor([0, 1, 7]), gallery, torch.tensor([0, 1, 0, 0]))
    # Query 0 sees classes 0, 1, 0, 0, query 1 sees 0, 1, 0, 0, and query 2 has no image of its class.
    assert found.queries == 2 and found.gallery == 4 and found.rank1 == 0.5
    assert found.mean_ap == pytest.approx(((1 + 2 / 3 + 3 / 4) / 3 + 1 / 2) / 2)
    assert retrieve(5 * query, torch.tensor([0, 1, 7]), gallery, torch.tensor([0, 1, 0, 0])) == found


def test_perfect_and_hopeless_features() -> None:
    labels = torch.arange(6) % 3
    perfect = torch.eye(3)[labels]
    assert retrieve(perfect, labels, perfect, labels).mean_ap == 1.0
    assert retrieve(perfect, labels, -perfect, labels).rank1 == 0.0


@pytest.mark.slow
def test_the_study_reads_the_split_and_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for part, first in (("train", 0), ("test", 20)):
        ids = [f"p{first + number}" for number in range(20)]
        write_split(data / f"{part}.parquet", pictures(20), [n % 4 for n in range(20)], ["a", "b", "c", "d"], id=ids)
    sizes = {"rounds": 1, "devices.count": 2, "data.partition": "iid", "local.batch-size": 4, "data.classes": 2}
    pairs = [f"--set={key}={value}" for key, value in {**sizes, "data.source": data, "data.cache": tmp_path}.items()]
    assert main(["run", *pairs, "--out", str(run), "--quiet"]) == 0
    asked = [str(run), "--data", str(data)]
    for split, said in (
        (None, "cannot be read"),
        ({"query": [], "gallery": []}, "cannot be read"),
        ({"query": ["p2"], "gallery": ["nope"]}, "no image 'nope'"),
        ({"query": ["p2"], "gallery": ["p1", "p22"]}, "of classes that are trained on; set data.classes=1, or fewer"),
    ):
        if split is not None:
            (data / "retrieval_split.json").write_text(json.dumps(split))
        assert retrieval.main(asked) == 2 and said in capsys.readouterr().err
    split = {"query": ["p2", "p3"], "gallery": ["p22", "p23", "p6"]}  # the pictures of p2 and p22 are the same
    (data / "retrieval_split.json").write_text(json.dumps(split))
    assert retrieval.main(asked) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["queries"] == 2 and found["gallery"] == 3
    assert found["rank1"] == found["rank1_before"] == 1.0, "an image is nearest to itself"
