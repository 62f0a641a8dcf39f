"""The wire: frames, codecs, the byte ledger and the tap.

Six streams (activations, gradients, parameters; each up and down) share one protocol, `Codec`;
codecs are named per stream and chained: `wire.activations-up = "topk,half"`. A last stage may be a
`Squeeze`, which works on the bytes of a whole frame. Which may stand where: `fedsplit.wire.chain`.
"""

from __future__ import annotations

from typing import Any

from fedsplit.types import STREAMS
from fedsplit.wire.bfloat16 import Bfloat16
from fedsplit.wire.delta import Delta
from fedsplit.wire.feedback import Feedback
from fedsplit.wire.half import Half
from fedsplit.wire.int8 import Int8
from fedsplit.wire.qsgd import Qsgd
from fedsplit.wire.recover import Recover
from fedsplit.wire.sign import Sign
from fedsplit.wire.topk import TokenTopK, TopK
from fedsplit.wire.zstd import Zstd

CODECS: dict[str, type[Any]] = {
    "delta": Delta,
    "feedback": Feedback,
    "recover": Recover,
    "topk": TopK,
    "token-topk": TokenTopK,
    "sign": Sign,
    "qsgd": Qsgd,
    "int8": Int8,
    "half": Half,
    "bfloat16": Bfloat16,
    "zstd": Zstd,
}

__all__ = ["CODECS", "STREAMS"]
