"""How client parts become one model.

A *merge* is `merge(base, updates, weights) -> model`; a tensor that an update does not hold is not
shared by that client. A *proximal* piece pulls local weights towards the round's global ones:
`gradient(parameter, anchor)`. A *partial* piece says what of a client's part is shared at all:
`shared(importance, blocks, depth) -> block numbers` for one side's blocks, `head` ("shared" or
"personal") for what is in no block, and `uses_gradients` where it reads the importance; several
combine by 'and' (`fedsplit.personal`). Every update passes the gate (`fedsplit.share.gate`) first.
"""

from __future__ import annotations

from typing import Any

from fedsplit.share.fedavg import FedAvg, Uniform
from fedsplit.share.fedprox import FedProx
from fedsplit.share.ptls import Ptls

MERGES: dict[str, type[Any]] = {"fedavg": FedAvg, "uniform": Uniform}
PROXIMAL: dict[str, type[Any]] = {"fedprox": FedProx}
PARTIAL: dict[str, type[Any]] = {"ptls": Ptls}
