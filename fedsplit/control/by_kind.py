"""Values of keys by kind of device: what `fedsplit plan --choose` writes for a mixed fleet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from fedsplit.control.facts import Facts
from fedsplit.control.told import rows_of, told
from fedsplit.types import FedsplitError, Scalar, knob

Values = dict[str, Scalar]


@dataclass(frozen=True)
class ByKind:
    """Gives every client the values that are written down for its kind of device, the same in every round.

    A kind is a profile of `devices.fleet`; one that is not named keeps the config's own values.

    Paper: none.
    Place: control.tune.
    Off: give = "".
    Deviates: nothing to deviate from.
    """

    give: str = knob(
        "", "values by kind, e.g. 'pi4: local.batch-size=8, wire.topk.keep=0.2; orin-nano: local.batch-size=32'"
    )

    columns: ClassVar[tuple[str, ...]] = ("round", "client", "kind", "values")
    placed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _ = self.kinds

    @cached_property
    def kinds(self) -> Mapping[str, Values]:
        """The values of keys by kind.

        Raises:
            FedsplitError: an entry that is not 'kind: key=value, ...', or that comes twice.
        """
        found: dict[str, Values] = {}
        for entry in filter(None, (part.strip() for part in self.give.split(";"))):
            kind, colon, pairs = entry.partition(":")
            if not colon or kind.strip() in found:
                raise FedsplitError(f"give: '{entry}' is not 'kind: key=value, ...', once for every kind.")
            found[kind.strip()] = dict(_pair(pair) for pair in filter(None, map(str.strip, pairs.split(","))))
        return found

    @property
    def keys(self) -> tuple[str, ...]:
        """The config keys that it sets."""
        return tuple(sorted({key for values in self.kinds.values() for key in values}))

    @property
    def choices(self) -> tuple[Values, ...]:
        """What it gives to some kind."""
        return tuple(values for values in self.kinds.values() if values)

    def meet(self, fleet: Iterable[str]) -> None:
        """Whether every kind that is named is in the fleet.

        Raises:
            FedsplitError: one is not.
        """
        known = sorted(set(fleet))
        for kind in self.kinds:
            if kind not in known:
                raise FedsplitError(f"control.by-kind.give names '{kind}'; the fleet has {', '.join(known)}.")

    def assign(self, facts: Facts, memory: Mapping[str, Any], key: int) -> tuple[dict[int, Values], dict[str, Any]]:
        """The values for every client of the round, and new memory."""
        names = {client: facts.devices[client].name for client in facts.clients}
        chosen = {client: dict(self.kinds.get(name, {})) for client, name in names.items()}
        rows = [
            {"client": client, "kind": names[client], "values": written(values)} for client, values in chosen.items()
        ]
        return chosen, told(memory, facts.round, rows)

    def rows(self, memory: Mapping[str, Any], round: int) -> list[dict[str, Any]]:
        """What choices.csv says of round `round`, one row a client."""
        return rows_of(memory, round)

    def draw(self, rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
        """Plot how many clients of each kind took part in every round; returns `path`."""
        from fedsplit.report import style

        picture = style.picture(7.0)
        axes: Any = picture.subplots()
        rounds = sorted({int(row["round"]) for row in rows})
        below = [0] * len(rounds)
        for place, kind in enumerate(sorted({str(row["kind"]) for row in rows})):
            counts = [sum(row["kind"] == kind and int(row["round"]) == number for row in rows) for number in rounds]
            axes.bar(rounds, counts, bottom=below, label=kind, color=style.COLOURS[place % len(style.COLOURS)])
            below = [low + count for low, count in zip(below, counts, strict=True)]
        style.dress(axes, x="round", y="clients", grid="y", whole="xy")
        style.legend(axes)
        picture.save(path)
        return path


def written(values: Mapping[str, Scalar]) -> str:
    """Values as they stand behind a kind."""
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _pair(text: str) -> tuple[str, Scalar]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise FedsplitError(f"give: '{text}' is not key=value, e.g. local.batch-size=8.")
    for kind in (int, float):
        try:
            return key.strip(), kind(value)
        except ValueError:
            continue
    return key.strip(), value.strip()
