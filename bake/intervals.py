"""What counts allow to say: an interval for a rate, a test for a change."""

from math import comb, sqrt
from statistics import NormalDist

__all__ = ["mcnemar", "wilson"]


def wilson(count: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """The score interval for the rate behind `count` out of `total`, both ends from 0 to 1.

    All of it where nothing was counted. Source: Wilson 1927 (J. Am. Stat. Assoc. 22, 209), as in
    Brown, Cai and DasGupta 2001 (Stat. Sci. 16, 101), eq. 4.

    >>> low, high = wilson(0, 100)
    >>> f"{low:.3f} {high:.3f}"
    '0.000 0.037'
    """
    if not total:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    rate, grown = count / total, 1 + z * z / total
    centre = (rate + z * z / (2 * total)) / grown
    half = z / grown * sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    # At both ends of the scale the formula gives them but for a rounding.
    low = 0.0 if count == 0 else max(0.0, centre - half)
    high = 1.0 if count == total else min(1.0, centre + half)
    return low, high


def mcnemar(one: int, other: int) -> float:
    """The exact two-sided p of pairs that changed: `one` of them one way, `other` the other way.

    As likely both ways, the smaller number would be at most as small with half this
    probability. Source: McNemar 1947 (Psychometrika 12, 153), with the binomial in place of its
    approximation.

    >>> mcnemar(5, 0)
    0.0625
    """
    changed = one + other
    tail = sum(comb(changed, k) for k in range(min(one, other) + 1))
    return min(1.0, 2 * tail / (1 << changed))
