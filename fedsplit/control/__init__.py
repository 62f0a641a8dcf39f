"""Numbers that change from round to round; each is a plain number again when a round begins.

A *schedule* of the learning rate is `factor(round, rounds) -> multiplier`. A *controller* sets config keys
for the clients of a round: `propose(memory, round, groups, key) -> (choices by group, memory)`, and
`observe(memory, round, gains, seconds) -> memory` after it (`fedsplit.control.steer`). What it chose is logged:
`columns` names the columns of `rows(memory, round)`, one of which is `round`, and `draw(rows, path)` plots
all of them (`fedsplit.tables`).
"""

from __future__ import annotations

from typing import Any

from fedsplit.control.bandit import Bandit
from fedsplit.control.fixed import Constant, Cosine

CONTROLLERS: dict[str, type[Any]] = {"bandit": Bandit}
SCHEDULES: dict[str, type[Any]] = {"constant": Constant, "cosine": Cosine}
