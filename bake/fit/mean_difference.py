"""MD: the difference of two class means."""

from torch import Tensor

from bake.fit.samples import Samples, unit

__all__ = ["mean_difference"]


def mean_difference(refused: Samples, answered: Samples) -> Tensor:
    """mean(refused) - mean(answered) [d], at length 1.

    Source: Arditi et al. 2024 (arXiv:2406.11717), equation 3.
    """
    difference = refused.mean - answered.mean
    return unit(difference, difference)
