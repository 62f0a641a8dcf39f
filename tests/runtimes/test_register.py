"""What devices say of themselves is not believed blindly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fedsplit.runtime.deployed import Register
from fedsplit.types import FedsplitError


class Grid:
    """Who is connected."""

    def __init__(self, *nodes: int) -> None:
        self.nodes = set(nodes)

    def get_node_ids(self) -> set[int]:
        return self.nodes


def register(grid: Grid, **said: tuple[Any, ...]) -> Register:
    made: Any = Register(grid)  # type: ignore[arg-type]
    for node, (partition, partitions, key) in said.items():
        content = {"device": {"partition": partition, "partitions": partitions, "public-key": key}}
        made._introduce(int(node[1:]), SimpleNamespace(has_error=lambda: False, content=content))
    return made  # type: ignore[no-any-return]


KEY = bytes(32)


def test_who_came_first_is_believed_while_it_is_there() -> None:
    grid = Grid(1, 2, 3, 4)
    found = register(grid, n1=(0, 2, KEY), n2=(1, 2, KEY), n3=(1, 2, KEY), n4=(0, 7, KEY))
    assert [node.id for node in found.present()] == [1, 2]
    grid.nodes = {1, 3, 4}  # device 1 came back under another id, and only then
    assert [node.id for node in found.present()] == [1, 3]


def test_a_contradiction_at_the_start_is_said() -> None:
    with pytest.raises(FedsplitError, match="disagree on num-partitions"):
        register(Grid(1, 2), n1=(0, 2, KEY), n2=(0, 3, KEY)).meet(0, 0.0)


@pytest.mark.parametrize(
    "said", [(0, 0, KEY), (2, 2, KEY), (-1, 2, KEY), (0, 2, b"short"), (0.0, 2, KEY), (0, "2", KEY)]
)
def test_an_impossible_introduction_counts_as_none(said: tuple[Any, ...]) -> None:
    assert register(Grid(1), n1=said).present() == []
