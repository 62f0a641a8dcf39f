"""Numbers that change from round to round; each is a plain number again when a round begins.

A *schedule* of the learning rate is `factor(round, rounds) -> multiplier`. A *controller* sets config keys, its
`keys`, for the clients of a round, within its `choices`, the ends or all of what it may choose. There are two forms
(`fedsplit.control.steer`):

- for groups of devices, learning from accuracy: `propose(memory, round, groups, key) -> (choices by group, memory)`,
  and `observe(memory, round, gains, seconds) -> memory` after the round;
- for every client, by what the server knows: `assign(facts, memory, key) -> (choices by client, memory)`
  (`fedsplit.control.facts`). With `timed` it is told how fast devices are, with `placed` of what kind. With
  `reveal(counts, key)`, which runs on the device, it is told once what that says of the device's labels.

What it chose is logged: `columns` names the columns of `rows(memory, round)`, one of which is `round`, and
`draw(rows, path)` plots all of them (`fedsplit.tables`).
"""

from __future__ import annotations

from typing import Any

from fedsplit.control.bandit import Bandit
from fedsplit.control.bandwidth import Bandwidth
from fedsplit.control.batch_size import BatchSize
from fedsplit.control.by_kind import ByKind
from fedsplit.control.fixed import Constant, Cosine
from fedsplit.control.importance import Importance
from fedsplit.control.staleness import Staleness

CONTROLLERS: dict[str, type[Any]] = {
    "bandit": Bandit,
    "bandwidth": Bandwidth,
    "batch-size": BatchSize,
    "by-kind": ByKind,
    "importance": Importance,
    "staleness": Staleness,
}
SCHEDULES: dict[str, type[Any]] = {"constant": Constant, "cosine": Cosine}
