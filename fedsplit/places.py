"""The places of the data path and the pieces that exist at each: the map of every method.

A list key of the config (`body.plans`) names pieces of its registry; the fields of a piece are keys
too (`body.lora.rank`). Each folder's registry is a literal dictionary in its `__init__.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedsplit import attacks, body, control, data, devices, front, share, tail, track, wire


@dataclass(frozen=True)
class Place:
    """One list key and the pieces it may name."""

    key: str
    prefix: str
    pieces: Mapping[str, type[Any]]
    single: bool = False


PLACES: tuple[Place, ...] = (
    Place("data.select", "data", data.SELECTORS),
    Place("local.phases", "local", tail.PHASES),
    Place("front.edits", "front", front.EDITS),
    Place("front.penalties", "front", front.PENALTIES),
    *(Place(f"wire.{stream}", "wire", wire.CODECS) for stream in wire.STREAMS),
    Place("body.edits", "body", body.EDITS),
    Place("body.plans", "body", body.PLANS),
    Place("share.merge", "share", share.MERGES, single=True),
    Place("share.proximal", "share", share.PROXIMAL),
    Place("share.partial", "share", share.PARTIAL),
    Place("control.tune", "control", control.CONTROLLERS),
    Place("optimizer.schedule", "control", control.SCHEDULES, single=True),
    Place("devices.availability", "devices", devices.AVAILABILITY, single=True),
)
# What is done with a run: no part of it, and of no influence on it.
STUDIES: tuple[Place, ...] = (
    Place("audit.attacks", "audit", attacks.ATTACKS),
    Place("track", "track", track.TRACKERS),
)
