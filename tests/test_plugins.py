"""Pieces from a file of one's own: registered by name, in every process, and refused with a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsplit import places, plugins
from fedsplit.config import keys, resolve
from fedsplit.runs import provenance
from fedsplit.types import FedsplitError

GOOD = '''
from dataclasses import dataclass

from fedsplit.front.guard import Guard, put
from fedsplit.types import knob


@dataclass(frozen=True)
class Clamp:
    """Clamps.

    Paper: none.
    Place: front.edits.
    Off: not named.
    Deviates: nothing.
    """

    limit: float = knob(LIMIT, "largest absolute value that is sent", low=0.0)

    def edit(self, vit, cut, key):
        return put(vit, cut, "clamp", ClampAll(self.limit))


class ClampAll(Guard):
    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def act(self, x):
        return x.clamp(-self.limit, self.limit)


PIECES = {"front.edits": {"clamp": Clamp}}
'''.replace("LIMIT", "2.0")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a file of pieces goes; what it registers is gone afterwards."""
    monkeypatch.setattr(plugins, "_plugged", {})
    monkeypatch.setenv(plugins.VARIABLE, "")
    edits = next(place.pieces for place in places.PLACES if place.key == "front.edits")
    before = dict(edits)
    yield tmp_path / "my_clamp.py"
    edits.clear()  # type: ignore[attr-defined]
    edits.update(before)  # type: ignore[attr-defined]
    keys.cache_clear()


def test_a_piece_of_ones_own_has_keys_and_runs_in_the_model(file: Path) -> None:
    file.write_text(GOOD)
    assert plugins.plug(file) == ("front.edits=clamp",)
    config = resolve({"front.edits": "clamp", "front.clamp.limit": 0.5})
    assert config.pieces("front.edits")[0].limit == 0.5
    with pytest.raises(FedsplitError, match=r"front\.clamp\.limit must be at least 0"):
        resolve({"front.clamp.limit": -1.0})
    assert str(provenance(config)["pieces"]).startswith("my_clamp.py ")


def test_a_changed_file_replaces_its_pieces(file: Path) -> None:
    file.write_text(GOOD)
    plugins.plug(file)
    file.write_text(GOOD.replace("2.0", "3.0").replace('"clamp": Clamp', '"clamp-more": Clamp'))
    assert plugins.plug(file) == ("front.edits=clamp-more",)
    assert keys()["front.clamp-more.limit"].default == 3.0
    assert "front.clamp.limit" not in keys()


def test_other_processes_have_it_by_the_environment(file: Path) -> None:
    file.write_text(GOOD)
    here = os.environ | {plugins.VARIABLE: str(file)}
    command = [sys.executable, "-m", "fedsplit.cli.main", "keys", "front.clamp"]
    done = subprocess.run(command, env=here, capture_output=True, text=True)
    assert done.returncode == 0 and "largest absolute value" in done.stdout
    lost = subprocess.run(command, env=here | {plugins.VARIABLE: "gone.py"}, capture_output=True, text=True)
    assert lost.returncode == 2 and "Cannot read the pieces of" in lost.stderr and "Traceback" not in lost.stderr


def test_a_relative_path_holds_for_processes_in_other_folders(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(GOOD)
    monkeypatch.chdir(file.parent)
    monkeypatch.setenv(plugins.VARIABLE, file.name)
    keys.cache_clear()
    assert "front.clamp.limit" in keys()
    assert os.environ[plugins.VARIABLE] == str(file.resolve())


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("PIECES = {", "OTHERS = {", "names no pieces"),
        ('"front.edits"', '"front.edit"', "no place 'front.edit'"),
        ('"clamp": Clamp', '"noise": Clamp', "has a piece 'noise' already"),
        ('"clamp": Clamp', '"My clamp": Clamp', "is no name of a piece"),
        ("frozen=True", "frozen=False", "must be a frozen dataclass"),
        ('knob(2.0, "largest absolute value that is sent", low=0.0)', "2.0", r"must be a knob"),
        ("from dataclasses", "from data_classes", "ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_is_refused_and_registers_nothing(file: Path, old: str, new: str, says: str) -> None:
    file.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(FedsplitError, match=says):
        plugins.plug(file)
    assert "front.clamp.limit" not in keys()
