"""Attacks reach what the server saw and what they are told, and no data: decided from the imports alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "fedsplit" / "attacks").glob("*.py"))
# All of fedsplit that an attack may reach, directly or through others.
OURS = {"fedsplit", "fedsplit.compat", "fedsplit.rng", "fedsplit.types"}
OTHERS = {"__future__", "collections", "dataclasses", "functools", "itertools", "math", "numpy", "torch", "typing"}
FILES_OF_ITS_OWN = {"work.py": {"os", "pathlib"}}  # it keeps what a stopped attack goes on from
LOADERS = {"__import__", "eval", "exec", "open", "importlib"}


def imported(source: str) -> set[str]:
    """Every module that `source` imports, wherever it does; `from a import b` may be the module a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            found |= {str(node.module)} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def path_of(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def reached(source: str) -> set[str]:
    """The modules of fedsplit that `source` imports, with all that they import, and the packages around them."""
    todo, seen = {name for name in imported(source) if name.startswith("fedsplit")}, set()
    while todo:
        module = todo.pop()
        path = path_of(module)
        if path is None or module in seen:
            continue
        seen.add(module)
        todo |= {name for name in imported(path.read_text()) if name.startswith("fedsplit")}
        todo.add(module.rpartition(".")[0] or "fedsplit")
    return seen


def foreign(source: str) -> set[str]:
    return {m for m in reached(source) if m not in OURS and m.split(".")[:2] != ["fedsplit", "attacks"]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_attack_reaches_no_data(path: Path) -> None:
    source = path.read_text()
    assert not foreign(source)
    allowed = OTHERS | FILES_OF_ITS_OWN.get(path.name, set())
    assert {name.split(".")[0] for name in imported(source)} - {"fedsplit"} <= allowed
    used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    assert not used & LOADERS


def test_the_test_sees_what_holds_data() -> None:
    for line in ("from fedsplit.data import sources", "from fedsplit import world", "import fedsplit.samples"):
        assert foreign(f"def f():\n    {line}\n"), line
    assert "fedsplit.data.sources" in reached("from fedsplit.world import world")
    assert "fedsplit.data.sources" in reached("import fedsplit.world"), "through others"
    assert not foreign("from fedsplit import rng\nfrom fedsplit.types import knob")
