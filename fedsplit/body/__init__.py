"""The server's part: the middle blocks.

An *edit* changes the backbone at build, as in `fedsplit.front`. A *plan* says which units run:
`plan(scores, budget, key) -> int8 (M, L, U)`, SKIP < FORWARD < FULL; plans combine by minimum.
"""

from __future__ import annotations

from typing import Any

from fedsplit.body.lora import Lora

EDITS: dict[str, type[Any]] = {"lora": Lora}
PLANS: dict[str, type[Any]] = {}
