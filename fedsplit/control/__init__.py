"""Numbers that change from round to round; each is a plain number again when a round begins.

A *schedule* of the learning rate is `factor(round, rounds) -> multiplier`.
"""

from __future__ import annotations

from typing import Any

from fedsplit.control.fixed import Constant, Cosine

SCHEDULES: dict[str, type[Any]] = {"constant": Constant, "cosine": Cosine}
