"""The notebooks: stored with the outputs of a real run, without logic, and each runs at its smoke setting."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted(Path("notebooks").glob("*.ipynb"))
LARGEST_BYTES = 4_000_000
SMOKE_S = 300
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def text(cell: dict[str, Any], field: str = "source") -> str:
    return "".join(cell[field])


def problems(cells: list[dict[str, Any]]) -> list[str]:
    """What is wrong with stored cells: not run in order, an error, a path of some machine."""
    found = []
    for number, cell in enumerate(cells, 1):
        if cell["execution_count"] != number:
            found.append(f"cell {number} was not run in order")
        for output in cell["outputs"]:
            if output["output_type"] == "error" or output.get("name") == "stderr":
                said = "".join(output.get("text", output.get("evalue", "")))
                found.append(f"cell {number} ended in an error or a warning: {said[-300:]}")
        if place := re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/[^\s\"]*", json.dumps(cell["outputs"])):
            found.append(f"cell {number} shows a path of a machine: {place[0]}")
    return found


def test_there_are_five() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@each
def test_a_notebook_is_stored_as_a_real_run_left_it(path: Path) -> None:
    assert path.stat().st_size < LARGEST_BYTES
    cells = code(path)
    assert problems(cells) == []
    pictures = sum("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
    assert pictures >= 3, "people look at notebooks"
    setting = next(cell for cell in cells if "SETTING =" in text(cell))
    assert '"smoke"' in text(setting) and '"real"' in text(setting)


@each
def test_a_notebook_has_no_logic(path: Path) -> None:
    for cell in code(path):
        if text(cell).startswith(("%%writefile", "!")):
            continue
        for node in ast.walk(ast.parse(text(cell))):
            assert not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.For | ast.While | ast.If | ast.Try)


def test_what_is_wrong_with_stored_cells_is_found() -> None:
    good = {"execution_count": 1, "outputs": [], "source": []}
    assert problems([good]) == []
    assert problems([{**good, "execution_count": None}]) == ["cell 1 was not run in order"]
    failed = {"output_type": "error", "ename": "X", "evalue": "no", "traceback": []}
    assert problems([{**good, "outputs": [failed]}]) == ["cell 1 ended in an error or a warning: no"]
    shown = {"output_type": "stream", "name": "stdout", "text": ["see /home/me/runs"]}
    assert problems([{**good, "outputs": [shown]}]) == ["cell 1 shows a path of a machine: /home/me/runs"]


@pytest.mark.slow
@pytest.mark.study
@each
def test_a_notebook_runs_at_its_smoke_setting(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder beside a copy of the configs, as in the repository; `make studies` runs it."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    repository = Path.cwd()
    for name in ("configs", "tests", "setup.cfg", "CONTRIBUTING.md"):
        (tmp_path / name).symlink_to(repository / name)
    (tmp_path / "notebooks").mkdir()
    shutil.copyfile(path, tmp_path / "notebooks" / path.name)
    monkeypatch.setenv("FEDSPLIT_SETTING", "smoke")
    monkeypatch.delenv("FEDSPLIT_DATA", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "cache"))
    notebook = nbformat.read(path, as_version=4)
    begun = time.monotonic()
    client = nbclient.NotebookClient(
        notebook, timeout=SMOKE_S, resources={"metadata": {"path": tmp_path / "notebooks"}}
    )
    client.execute()
    print(f"{path.stem}: {time.monotonic() - begun:.0f} s")
    assert problems([cell for cell in notebook.cells if cell.cell_type == "code"]) == []
    shown = str([cell.outputs for cell in notebook.cells if cell.cell_type == "code"])
    assert " failed" not in shown and "image/png" in shown
