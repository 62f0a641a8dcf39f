"""The server's part: the middle blocks.

An *edit* changes the backbone at build, as in `fedsplit.front`. A *plan* says which units run:
`plan(ask, key) -> int8 (M, L, U)`, SKIP < FORWARD < FULL, for M micro-batches, L blocks of U units; plans
combine by minimum. It may also have `scale(ask, ops) -> (M, L)`, which combine by product, `metrics` by
which it wants units scored, and `check(ask)` (`fedsplit.body.planner`).
"""

from __future__ import annotations

from typing import Any

from fedsplit.body.knapsack import Knapsack
from fedsplit.body.layerdrop import LayerDrop
from fedsplit.body.lora import Lora

EDITS: dict[str, type[Any]] = {"lora": Lora}
PLANS: dict[str, type[Any]] = {"knapsack": Knapsack, "layerdrop": LayerDrop}
