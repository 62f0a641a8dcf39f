"""Named suites: which attacks, and how long each may work. A suite's values come before the user's `--set`."""

from __future__ import annotations

from collections.abc import Mapping

from fedsplit.types import FedsplitError, Scalar

# quick is under 3 minutes on 2 cores for the shipped backbone; full is for a GPU, or a night.
SUITES: Mapping[str, Mapping[str, Scalar]] = {
    "quick": {
        "audit.attacks": "closed-form,linear,rmle,inverse-net,labels",
        "audit.victims": 16,
        "audit.images": 600,
        "audit.seeds": 1,
    },
    "standard": {
        "audit.attacks": "closed-form,linear,rmle,inverse-net,averaged,shadow,labels",
        "audit.victims": 32,
        "audit.images": 1000,
        "audit.seeds": 3,
    },
    "full": {
        "audit.attacks": "closed-form,linear,rmle,inverse-net,averaged,shadow,fsha,labels",
        "audit.victims": 64,
        "audit.images": 10000,
        "audit.seeds": 3,
        "audit.knows": "front,rest,query,hijack",
    },
}


def suite(name: str) -> Mapping[str, Scalar]:
    """The keys of a suite.

    Raises:
        FedsplitError: there is none of this name.
    """
    if name not in SUITES:
        raise FedsplitError(f"There is no audit suite '{name}'; known: {', '.join(SUITES)}.")
    return SUITES[name]
