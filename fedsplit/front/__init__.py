"""The client's first part: patch embedding, prompts and first blocks.

An *edit* changes the backbone at build: `edit(vit, cut, key) -> vit`, applied before the cut, so that a
global block number means the same on both sides. A *penalty* adds a term to the loss of the front:
`penalty(front, x, h, memory, key) -> (scalar, memory)`.
"""

from __future__ import annotations

from typing import Any

from fedsplit.front.prompts import Prompts

EDITS: dict[str, type[Any]] = {"prompts": Prompts}
PENALTIES: dict[str, type[Any]] = {}
