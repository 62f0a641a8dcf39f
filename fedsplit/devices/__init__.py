"""The fleet: what devices there are and when, what a round costs them, and the virtual clock.

`availability` says when devices are there (`Availability`: `available(devices, time_s, key) -> mask` and
`changes_s(time_s)`, the next time at which that may change), `profiles` what they are, `cohort` who takes part in a
round and is lost on the way, `clock` how long it takes, `fit` whether their memory suffices, `calibrate` measures
this machine.
"""

from __future__ import annotations

from typing import Any

from fedsplit.devices.availability import Always, Diurnal, Random, Trace

AVAILABILITY: dict[str, type[Any]] = {"always": Always, "random": Random, "diurnal": Diurnal, "trace": Trace}
