"""WRMD: RMD on statistics weighted by refusal confidence."""

__all__ = ["confidence_weight"]

FLOOR = 0.01


def confidence_weight(confidence: float, refused: bool) -> float:
    """The weight of a sample of confidence c in [-1, 1] in its class.

    max(c, 0.01) for the refused class, max(-c, 0.01) for the answered one; means
    and covariance take these weights, and `rmd` does the rest. The neutral centre
    of the restatements (METHODS.md 1.4) cancels: a difference of means and a
    covariance do not depend on the origin.
    """
    return max(confidence if refused else -confidence, FLOOR)
