"""`fedsplit plan --choose`: which values of some keys every kind of device can bear, and what each would cost.

Values are tried in the order in which they are preferred. Keys that hold for the whole model (the cut, prompts,
the list of codecs) have one value for all devices; those that controllers may set client by client (batch size,
keys of codecs) may differ from one kind of device to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from fedsplit.book import Book
from fedsplit.config import Config, resolve
from fedsplit.control import steer
from fedsplit.control.by_kind import written
from fedsplit.devices.clock import cost
from fedsplit.devices.profiles import Profile
from fedsplit.types import FedsplitError, Scalar
from fedsplit.world import World, ghost, steered

Values = Mapping[str, Scalar]
# What a limit may bound, of a client and round.
MEASURES = ("seconds", "bytes", "joules", "memory_bytes", "storage_bytes")
ROUNDS = 2


@dataclass(frozen=True)
class Weighed:
    """One try: `values` for one kind of device, how many preferences lie before it, what the dearest of a device's
    first rounds costs, and what that breaks (empty if nothing).
    """

    kind: str
    shared: Values
    own: Values
    rank: int
    costs: Mapping[str, float]
    breaks: tuple[str, ...]


@dataclass(frozen=True)
class Chosen:
    """The outcome: `shared` values, `own` ones by kind of device, and everything that was weighed on the way."""

    shared: Values
    own: Mapping[str, Values]
    weighed: tuple[Weighed, ...]


@dataclass
class Search:
    """Tries of `tries` (key -> values, preferred first) for `config` under `limits` (a measure -> its bound)."""

    config: Config
    tries: Mapping[str, Sequence[Scalar]]
    limits: Mapping[str, float]
    weighed: list[Weighed] = field(default_factory=list)
    _profiles: dict[str, Profile] = field(default_factory=dict)

    def bounds(self, kind: str) -> dict[str, float]:
        """What a kind of device may spend: its own memory and storage, and the limits, whichever is less."""
        profile = self._profiles[kind]
        own = {name: float(getattr(profile, name)) for name in ("memory_bytes", "storage_bytes")}
        found = {name: bound for name, bound in own.items() if bound}
        return found | {name: min(bound, found.get(name, bound)) for name, bound in self.limits.items()}

    def best(self) -> Chosen:
        """The values with the fewest preferences given up: of the shared keys, and of each kind's own in the mean.

        Of equally preferred ones those whose slowest kind is fastest.

        Raises:
            FedsplitError: no try is within the limits on every kind of device.
        """
        own_keys = [key for key in self.tries if steer.may_differ(key)]
        shared_keys = [key for key in self.tries if key not in own_keys]
        found: tuple[float, float] | None = None
        chosen: Chosen | None = None
        for rank, shared in _ranked(self.tries, shared_keys):
            if found is not None and rank > found[0]:
                break
            picked = self._fit(shared, rank, own_keys)
            if picked is None:
                continue
            given_up = rank + sum(try_.rank - rank for try_ in picked.values()) / len(picked)
            score = (given_up, max(try_.costs["seconds"] for try_ in picked.values()))
            if found is None or score < found:
                found, chosen = score, Chosen(shared, {kind: try_.own for kind, try_ in picked.items()}, ())
        if chosen is None:
            raise FedsplitError(self._excuse())
        return replace(chosen, weighed=tuple(self.weighed))

    def _fit(self, shared: Values, rank: int, own_keys: Sequence[str]) -> dict[str, Weighed] | None:
        """For each kind of device its most preferred try with `shared` that keeps the limits; None if one has none."""
        world = ghost(resolve({**self.config.values, **shared}))
        picked = {}
        for kind, device in _kinds(world).items():
            self._profiles[kind] = world.fleet[device]
            for more, own in _ranked(self.tries, own_keys):
                try_ = self._weigh(world, kind, device, shared, own, rank + more)
                self.weighed.append(try_)
                if not try_.breaks:
                    picked[kind] = try_
                    break
            else:
                return None
        return picked

    def _weigh(self, world: World, kind: str, device: int, shared: Values, own: Values, rank: int) -> Weighed:
        world = steered(world, steer.dump(own))
        book, profile = Book(world), world.fleet[device]
        rate = world.config.devices.server_flops_per_s
        rounds = [book.report(number, device) for number in range(1, ROUNDS + 1)]
        spent = [cost(report, profile, rate) for report in rounds]
        costs = {
            "seconds": max(one.seconds for one in spent),
            "bytes": max(float(sum(report.bytes.values())) for report in rounds),
            "joules": max(one.joules for one in spent),
            "memory_bytes": float(book.peaks()[0]),
            "storage_bytes": float(max(0, book.stored - world.config.front.cache_memory_bytes)),
        }
        breaks = tuple(name for name, bound in self.bounds(kind).items() if costs[name] > bound)
        return Weighed(kind, shared, own, rank, costs, breaks)

    def _excuse(self) -> str:
        if not self.weighed:
            return "Nothing was left to weigh: no --try has a value within the limits."
        near = min(self.weighed, key=lambda try_: (len(try_.breaks), try_.costs["seconds"]))
        measure = near.breaks[0]
        bound = self.bounds(near.kind)[measure]
        tried = ", ".join(f"{key}={value}" for key, value in {**near.shared, **near.own}.items())
        return (
            f"Nothing that was tried is within the limits on {near.kind}: with {tried} a round takes "
            f"{near.costs[measure]:,.4g} {unit(measure)} of {bound:,.4g}; raise the limit, or --try more."
        )


def _ranked(tries: Mapping[str, Sequence[Scalar]], keys: Sequence[str]) -> Iterator[tuple[int, dict[str, Scalar]]]:
    """Every combination of the values of `keys`, with the sum of their places, fewest first."""
    places = product(*(range(len(tries[key])) for key in keys))
    for combination in sorted(places, key=lambda places: (sum(places), places)):
        yield sum(combination), {key: tries[key][place] for key, place in zip(keys, combination, strict=True)}


def _kinds(world: World) -> dict[str, int]:
    """Of each kind of device the one with the most samples."""
    found: dict[str, int] = {}
    for device, profile in enumerate(world.fleet):
        if profile.name not in found or len(world.shards[device]) > len(world.shards[found[profile.name]]):
            found[profile.name] = device
    return found


def unit(measure: str) -> str:
    """The unit of a measure, as a sentence says it."""
    return {"memory_bytes": "bytes of memory", "storage_bytes": "bytes of storage"}.get(measure, measure)


def settled(config: Config, chosen: Chosen) -> Config:
    """`config` with what was chosen: keys that all kinds share as they are, the others by `control.by-kind`."""
    values = {**config.values, **chosen.shared}
    now = resolve(values)
    own = {
        kind: {key: value for key, value in its.items() if steer.is_named(now, key)} for kind, its in chosen.own.items()
    }
    first = next(iter(own.values()))
    alike = {key: value for key, value in first.items() if all(its[key] == value for its in own.values())}
    differ = {kind: {key: its[key] for key in its if key not in alike} for kind, its in own.items()}
    values |= alike
    if any(differ.values()):
        values["control.by-kind.give"] = "; ".join(f"{kind}: {written(its)}" for kind, its in differ.items())
        values["control.tune"] = ",".join(dict.fromkeys((*now.names("control.tune"), "by-kind")))
    return resolve(values)
