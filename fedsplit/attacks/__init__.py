"""The attacks that test a front: what they make of the server's transcript is what the defence left.

An attack is a frozen dataclass with `needs`, `finds` and
`run(transcript, knowledge, key, work) -> images or labels` (`base.Attack`); `fedsplit audit` scores it.
"""

from __future__ import annotations

from typing import Any

from fedsplit.attacks.averaged import Averaged
from fedsplit.attacks.closed_form import ClosedForm
from fedsplit.attacks.fsha import Fsha
from fedsplit.attacks.inverse_net import InverseNet
from fedsplit.attacks.labels import Labels
from fedsplit.attacks.linear import Linear
from fedsplit.attacks.rmle import RMLE
from fedsplit.attacks.shadow import Shadow

ATTACKS: dict[str, type[Any]] = {
    "closed-form": ClosedForm,
    "linear": Linear,
    "rmle": RMLE,
    "inverse-net": InverseNet,
    "averaged": Averaged,
    "shadow": Shadow,
    "fsha": Fsha,
    "labels": Labels,
}
