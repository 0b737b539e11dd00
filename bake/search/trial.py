"""What a trial found, and which trials are worth their full answers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bake.evaluate import limits
from bake.recipe import Guard
from bake.search.space import Point

__all__ = [
    "DIGITS",
    "Figures",
    "Trial",
    "behind_front",
    "excess",
    "finalists",
    "front",
    "objectives",
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


def excess(guard: Guard, kl_at_most: float, base: Figures, now: Figures) -> dict[str, float]:
    """How far each limit is exceeded, below 0 where it is not.

    Of the two on the divergence the lower counts: the recipe's guard may have one. What the guard
    asks of the target is a limit too: a front that is nowhere near it would be of no use.
    """
    kl_at_most = min(kl_at_most, guard.divergence_at_most or kl_at_most)
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


def finalists(trials: Sequence[Trial], guard: Guard, count: int) -> list[Trial]:
    """The trials whose answers are written in full: of the front, then of the one behind it.

    Of a front with more than are wanted there are as many: half of them the best by target, the
    others evenly spread over the rest. Where too few trials are allowed those follow that break
    the limits least.
    """
    found: list[Trial] = []
    left = [one for one in trials if one.figures is not None]
    while len(found) < count and (nearest := front(left, guard)):
        best = (count - len(found) + 1) // 2
        found += nearest[:best]
        found += _spread(nearest[best:], count - len(found))
        numbers = {one.number for one in nearest}
        left = [one for one in left if one.number not in numbers]
    others = [one for one in left if not one.allowed]
    others.sort(key=lambda one: (bool(one.stopped), one.violation))
    return found + others[: count - len(found)]


def _spread(trials: Sequence[Trial], count: int) -> list[Trial]:
    """As many of the trials, from the first to the last of them."""
    if len(trials) <= count:
        return list(trials)
    steps = max(1, count - 1)
    return [trials[n * (len(trials) - 1) // steps] for n in range(count)]
