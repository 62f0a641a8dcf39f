"""How client parts become one model.

A *merge* is `merge(base, updates, weights) -> model`; a tensor that an update does not hold is not
shared by that client. A *proximal* piece pulls local weights towards the round's global ones:
`gradient(parameter, anchor)`. Every update passes the gate (`fedsplit.share.gate`) first.
"""

from __future__ import annotations

from typing import Any

from fedsplit.share.fedavg import FedAvg, Uniform
from fedsplit.share.fedprox import FedProx

MERGES: dict[str, type[Any]] = {"fedavg": FedAvg, "uniform": Uniform}
PROXIMAL: dict[str, type[Any]] = {"fedprox": FedProx}
