"""The wire: frames, codecs, the byte ledger and the tap.

Six streams (activations, gradients, parameters; each up and down) share one protocol, `Codec`;
codecs are named per stream and chained: `wire.activations-up = "topk,half"`.
"""

from __future__ import annotations

from typing import Any

from fedsplit.types import STREAMS
from fedsplit.wire.half import Half

CODECS: dict[str, type[Any]] = {"half": Half}

__all__ = ["CODECS", "STREAMS"]
