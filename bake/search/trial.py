"""What a trial found, and which trials are worth their full answers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

from bake.evaluate import limits
from bake.recipe import Guard, Recipe
from bake.search.space import Point

__all__ = [
    "DIGITS",
    "Figures",
    "Trial",
    "behind_front",
    "excess",
    "front",
    "kl_limit",
    "objectives",
    "ranked",
    "violated",
]

# Decimals that a figure keeps: beyond them it is rounding, and no trial shall depend on that.
DIGITS = 6


@dataclass(frozen=True)
class Figures:
    """What the first token says: by role the mean P(refusal) in percent, and the divergence.

    `kl` is the mean KL(base || steered) of the first token of answers to general prompts, in nats.
    Of a trial that was stopped there are the roles that were looked at.
    """

    refusals: Mapping[str, float]
    kl: float


@dataclass(frozen=True)
class Trial:
    """A point by what the sampler drew and as a recipe takes it, with its figures.

    `excess` by role is how far refusals moved beyond the guard's limit, in points, and for `kl`
    in nats: at most 0 is allowed. `failed` says why there are no figures, and `stopped` why there
    are no more of them.
    """

    number: int
    drawn: Mapping[str, Any]
    point: Point
    figures: Figures | None = None
    excess: Mapping[str, float] = field(default_factory=dict)
    failed: str = ""
    stopped: str = ""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Trial":
        """The trial that `as_json` made these values of."""
        figures = Figures(**values["figures"]) if values["figures"] else None
        return cls(**{**values, "figures": figures})

    def as_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    @property
    def allowed(self) -> bool:
        """Whether no limit is broken."""
        return self.figures is not None and not self.violation

    @property
    def violation(self) -> float:
        """How far all limits are broken in sum (`violated`)."""
        return violated(self.excess)


def violated(excess: Mapping[str, float]) -> float:
    """How far all limits are broken in sum, a nat counted as a point of percent as 100."""
    scale = {"kl": 100.0}
    return sum(max(0.0, one) * scale.get(role, 1.0) for role, one in excess.items())


def kl_limit(recipe: Recipe) -> float:
    """The lower of two limits on the divergence: the recipe's guard may have one."""
    assert recipe.search is not None
    most = recipe.search.kl_at_most
    return min(most, recipe.guard.divergence_at_most or most)


def excess(guard: Guard, kl_at_most: float, base: Figures, now: Figures) -> dict[str, float]:
    """How far each limit is exceeded, below 0 where it is not.

    What the guard asks of the target is a limit too: a front that is nowhere near it would be of
    no use.
    """
    found = {
        role: round(sign * (now.refusals[role] - base.refusals[role]) - limit, DIGITS)
        for role, _, limit, sign in limits(guard)
        if role in now.refusals
    }
    target = now.refusals.get("target")
    if target is not None and guard.target_at_most is not None:
        found["target"] = round(target - guard.target_at_most, DIGITS)
    elif target is not None and guard.target_at_least is not None:
        found["target"] = round(guard.target_at_least - target, DIGITS)
    return {**found, "kl": round(now.kl - kl_at_most, DIGITS)}


def objectives(guard: Guard, figures: Figures) -> tuple[float, float]:
    """What is to become small: target refusals (or what is left to 100 %), and divergence.

    Of a trial that was stopped before its target was looked at, the worst.
    """
    up = guard.target_at_least is not None
    target = figures.refusals.get("target", 0.0 if up else 100.0)
    return (100 - target if up else target), figures.kl


def behind_front(
    guard: Guard, finished: Sequence[Trial], over: Mapping[str, float], so_far: Figures
) -> str:
    """Why a trial cannot come onto the front whatever its other roles give; empty where it can.

    `over` is its `excess` so far. As long as no trial is allowed, one is stopped that breaks the
    limits more than the one that breaks them least.
    """
    nearest = front(finished, guard)
    if not nearest:
        whole = [one for one in finished if one.figures is not None and not one.stopped]
        least = min(whole, key=lambda one: one.violation, default=None)
        return f"trial {least.number}" if least and violated(over) >= least.violation else ""
    for role, one in over.items():
        if one > 0:
            return f"the limit of {role}"
    if "target" in so_far.refusals:
        target, kl = objectives(guard, so_far)
        for other in nearest:
            assert other.figures is not None
            best = objectives(guard, other.figures)
            if best[0] <= target and best[1] <= kl:
                return f"trial {other.number}"
    return ""


def front(trials: Sequence[Trial], guard: Guard) -> list[Trial]:
    """The allowed trials that no other one beats in both objectives, the best target first.

    Of equal ones the first counts.
    """
    found: list[Trial] = []
    allowed = [
        (*objectives(guard, one.figures), one.number, one)
        for one in trials
        if one.allowed and one.figures
    ]
    for _, kl, _, one in sorted(allowed, key=lambda found: found[:3]):
        best = found[-1].figures if found else None
        if best is None or kl < best.kl:
            found.append(one)
    return found


def ranked(trials: Sequence[Trial], guard: Guard) -> list[Trial]:
    """All trials with figures, in the order in which they are worth their full answers.

    Of the front in turn the best by target that is left, and one that halves the widest part of
    it; then of the front behind that, and in the end those that break the limits least.
    """
    found: list[Trial] = []
    left = [one for one in trials if one.figures is not None]
    while nearest := front(left, guard):
        places = chain.from_iterable(zip(range(len(nearest)), _spread(len(nearest)), strict=True))
        found += [nearest[place] for place in dict.fromkeys(places)]
        numbers = {one.number for one in nearest}
        left = [one for one in left if one.number not in numbers]
    left.sort(key=lambda one: (bool(one.stopped), one.violation))
    return found + left


def _spread(count: int) -> list[int]:
    """The places 0 to count - 1: the ends, then what is farthest from those before it."""
    found = [0, count - 1][:count]
    while len(found) < count:
        others = [place for place in range(count) if place not in found]
        found.append(max(others, key=lambda place: min(abs(place - one) for one in found)))
    return found
