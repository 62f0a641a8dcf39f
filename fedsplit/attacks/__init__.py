"""The attacks that test a front: what they make of the server's transcript is what the defence left.

An attack is a frozen dataclass with `needs`, `finds` and
`run(transcript, knowledge, key, work) -> images or labels` (`base.Attack`); `fedsplit audit` scores it.
"""

from __future__ import annotations

from typing import Any

ATTACKS: dict[str, type[Any]] = {}
