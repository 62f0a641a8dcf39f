"""The attacks that test a front: what they make of the server's transcript is what the defence left.

An attack is a frozen dataclass with `needs`, `finds` and
`run(transcript, knowledge, key, work) -> images or labels` (`base.Attack`); `fedsplit audit` scores it.
"""

from __future__ import annotations

from typing import Any

from fedsplit.attacks.closed_form import ClosedForm
from fedsplit.attacks.labels import Labels
from fedsplit.attacks.linear import Linear
from fedsplit.attacks.rmle import RMLE

ATTACKS: dict[str, type[Any]] = {
    "closed-form": ClosedForm,
    "linear": Linear,
    "rmle": RMLE,
    "labels": Labels,
}
