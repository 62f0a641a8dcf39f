"""The fleet: what devices there are and when, what a round costs them, and the virtual clock."""

from __future__ import annotations

from typing import Any

from fedsplit.devices.availability import Always, Diurnal, Random, Trace

AVAILABILITY: dict[str, type[Any]] = {"always": Always, "random": Random, "diurnal": Diurnal, "trace": Trace}
