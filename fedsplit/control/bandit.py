"""A multi-armed bandit that tries rates and shapes of layer dropout while the run goes on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsplit import rng
from fedsplit.body.layerdrop import SHAPES
from fedsplit.types import FedsplitError, Scalar, knob, split_names

Memory = dict[str, Any]
Arm = tuple[float, str]
COLUMNS = ("round", "group", "rate", "shape", "explored", "gain", "seconds", "reward")
RATE, SHAPE = "body.layerdrop.rate", "body.layerdrop.shape"


@dataclass(frozen=True)
class Bandit:
    """Chooses each round's rate and shape of layer dropout by what they earned: accuracy gain per second.

    Each device group learns by itself. An arm with no reward in the window is tried first, so a change of
    the best arm is noticed after at most `window` rounds, and every arm is tried about that often.

    Paper: arXiv 2503.10217 (DropPEFT), its online configurator; policies: epsilon-greedy (Sutton and Barto,
        Reinforcement Learning, section 2.2) and sliding-window UCB (arXiv 0805.3415).
    Place: control.tune.
    Off: one rate and one shape.
    Deviates: its public text names neither policy, arms nor forgetting; one arm a group, not one a device; UCB
        scales rewards by the largest absolute one in the window, since their bound is not known beforehand.
        The gain is that of the shared model, so groups differ in their seconds only.
    """

    rates: str = knob("0,0.2,0.4,0.6", "rates of layer dropout to choose from, comma-separated")
    shapes: str = knob("increasing", "shapes of layer dropout to choose from, comma-separated")
    policy: str = knob("epsilon-greedy", "how an arm is chosen", choices=("epsilon-greedy", "ucb"))
    epsilon: float = knob(0.3, "probability of a random arm in round 1 (epsilon-greedy)", low=0.0, high=1.0)
    decay: float = knob(0.95, "what epsilon is multiplied by every round", low=0.0, high=1.0)
    exploration: float = knob(0.3, "weight of the confidence bound; 0 is greedy (ucb)", low=0.0)
    window: int = knob(20, "rounds after which a reward is forgotten; at least the number of arms", low=1)
    groups: int = knob(1, "device groups, each with a choice of its own", low=1)

    def __post_init__(self) -> None:
        if self.window < len(self.arms):
            raise FedsplitError(
                f"window={self.window} forgets the first of {len(self.arms)} arms before the last is tried; "
                f"give at least {len(self.arms)}."
            )

    @property
    def keys(self) -> tuple[str, ...]:
        """The config keys that it sets."""
        return (RATE, SHAPE)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of `rows`."""
        return COLUMNS

    @property
    def choices(self) -> tuple[dict[str, Scalar], ...]:
        """What it may propose for a group: the values of `keys` of every arm."""
        return tuple({RATE: rate, SHAPE: shape} for rate, shape in self.arms)

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Every rate with every shape; rate 0, which has no shape, once.

        Raises:
            FedsplitError: a rate outside [0, 1), an unknown shape, a repetition, or none at all.
        """
        rates, shapes = _rates(self.rates), _shapes(self.shapes)
        return tuple((rate, shape) for rate in rates for shape in (shapes if rate else shapes[:1]))

    def propose(self, memory: Memory, round: int, groups: int, key: int) -> tuple[list[dict[str, Scalar]], Memory]:
        """The values of `keys` for each of `groups` in round `round`, and new memory.

        `memory` is {} at first and plain JSON ever after; `key` may be the same in every round. A second
        proposal for a round takes the place of the first.
        """
        known = [entry for entry in memory.get("tries", []) if round - self.window <= entry["round"] < round]
        fresh = [self._choose(known, round, group, rng.key(key, "arm", round, group)) for group in range(groups)]
        choices: list[dict[str, Scalar]] = [{RATE: entry["rate"], SHAPE: entry["shape"]} for entry in fresh]
        return choices, {**memory, "tries": known + fresh}

    def observe(
        self, memory: Memory, round: int, gains: Sequence[float | None], seconds: Sequence[float | None]
    ) -> Memory:
        """New memory after round `round`, in which group g gained `gains[g]` accuracy in `seconds[g]`.

        The reward is their quotient. Nothing is learnt of a group with no gain, a gain that is not a number,
        or no time: no clients, or devices that are infinitely fast.
        """
        tries = []
        for entry in memory.get("tries", []):
            if entry["round"] == round:
                gain, spent = gains[entry["group"]], seconds[entry["group"]]
                entry = {**entry, "gain": _finite(gain), "seconds": _finite(spent), "reward": _reward(gain, spent)}
            tries.append(entry)
        return {**memory, "tries": tries}

    def rows(self, memory: Mapping[str, Any], round: int) -> list[dict[str, Any]]:
        """What choices.csv says of round `round`, one row a group; what was not learnt is an empty cell."""
        return [
            {name: "" if entry[name] is None else entry[name] for name in COLUMNS}
            for entry in memory.get("tries", [])
            if entry["round"] == round
        ]

    def draw(self, rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
        """Plot rows of choices.csv (text or values): rates and rewards over rounds; returns `path`.

        Colours are device groups, markers shapes; a hollow marker was not the best known arm.
        """
        from matplotlib.lines import Line2D

        from fedsplit.report import style

        colours = style.COLOURS
        markers = dict(zip(SHAPES, "^so*", strict=True))
        table = sorted(rows, key=lambda row: (int(row["group"]), int(row["round"])))
        picture = style.picture(height=5.2)
        upper, lower = picture.subplots(2, 1, sharex=True)
        groups = sorted({int(row["group"]) for row in table})
        for group in groups:
            mine, colour = [row for row in table if int(row["group"]) == group], colours[group % len(colours)]
            shift = 0.4 * (group - (len(groups) - 1) / 2) / len(groups)  # else equal choices hide each other
            places = [int(row["round"]) + shift for row in mine]
            upper.step(places, [float(row["rate"]) for row in mine], where="mid", color=colour, lw=1)
            for place, row in zip(places, mine, strict=True):
                look = {"color": colour, "marker": markers[row["shape"]], "ls": "", "ms": 6}
                look["mfc"] = "white" if str(row["explored"]) == "True" else colour
                upper.plot(place, float(row["rate"]), **look)
                if row["reward"] not in ("", None):
                    lower.plot(place, 100 * float(row["reward"]), **look)
        style.dress(upper, y="dropped blocks (fraction)")
        style.dress(lower, x="round", y="reward: accuracy gain\n(% points per virtual s)", whole="x")
        handles = [Line2D([], [], color=colours[g % len(colours)], label=f"group {g}") for g in groups]
        used = [shape for shape in SHAPES if any(row["shape"] == shape for row in table)]
        grey: dict[str, Any] = {"color": "0.4", "ls": ""}
        handles += [Line2D([], [], marker=markers[shape], label=shape, **grey) for shape in used]
        handles.append(Line2D([], [], marker="o", mfc="white", label="hollow: explored", **grey))
        style.legend(picture, 6, loc="outside upper center", handles=handles)
        picture.save(path)
        return path

    def _choose(self, known: Sequence[Mapping[str, Any]], round: int, group: int, stream: int) -> dict[str, Any]:
        """An entry of the memory: the arm of `group` and why, with nothing observed yet."""
        earned: dict[Arm, list[float]] = {arm: [] for arm in self.arms}
        for entry in known:
            arm = (entry["rate"], entry["shape"])
            if entry["group"] == group and entry["reward"] is not None and arm in earned:
                earned[arm].append(entry["reward"])
        source = rng.numpy_rng(stream)
        order = [self.arms[place] for place in source.permutation(len(self.arms))]  # decides between equals
        means = {arm: sum(rewards) / len(rewards) for arm, rewards in earned.items() if rewards}
        best = max((arm for arm in order if arm in means), key=lambda arm: means[arm], default=None)
        untried = [arm for arm in order if arm not in means]
        if untried:
            chosen = untried[0]
        elif self.policy == "ucb":
            bounds = self._bounds(earned, means)
            chosen = max(order, key=lambda arm: bounds[arm])
        elif best is None or source.random() < self.epsilon * self.decay ** (round - 1):
            chosen = self.arms[int(source.integers(len(self.arms)))]
        else:
            chosen = best
        rate, shape = chosen
        entry = {"round": round, "group": group, "rate": rate, "shape": shape, "explored": chosen != best}
        return {**entry, "estimate": means.get(chosen), "gain": None, "seconds": None, "reward": None}

    def _bounds(self, earned: Mapping[Arm, Sequence[float]], means: Mapping[Arm, float]) -> dict[Arm, float]:
        """The upper confidence bound of each arm; the reward's scale B is that of the window."""
        tries = sum(len(rewards) for rewards in earned.values())
        scale = max(abs(reward) for rewards in earned.values() for reward in rewards) or 1.0
        return {
            arm: means[arm] / scale + self.exploration * math.sqrt(math.log(tries) / len(rewards))
            for arm, rewards in earned.items()
        }


def _rates(text: str) -> tuple[float, ...]:
    found = []
    for word in _listed(text, "rates", "0,0.4"):
        try:
            rate = float(word)
        except ValueError:
            raise FedsplitError(f"rates has '{word}', which is not a number; write e.g. 0,0.2,0.4.") from None
        if not 0 <= rate < 1:
            raise FedsplitError(f"rates has {word}; every rate must be at least 0 and less than 1.")
        if rate in found:
            raise FedsplitError(f"rates has {word} more than once; name it once.")
        found.append(rate)
    return tuple(found)


def _shapes(text: str) -> tuple[str, ...]:
    names = _listed(text, "shapes", "increasing,uniform")
    for name in names:
        if name not in SHAPES:
            raise FedsplitError(f"shapes has '{name}', which is no shape; known: {', '.join(SHAPES)}.")
        if names.count(name) > 1:
            raise FedsplitError(f"shapes has {name} more than once; name it once.")
    return names


def _listed(text: str, name: str, example: str) -> tuple[str, ...]:
    words = split_names(text)
    if not words:
        raise FedsplitError(f"{name} is empty; give at least one, e.g. {example}.")
    return words


def _reward(gain: float | None, seconds: float | None) -> float | None:
    """Gain per second; None where there is nothing to learn."""
    if gain is None or seconds is None or not 0 < seconds < math.inf:
        return None
    return _finite(gain / seconds)


def _finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None
