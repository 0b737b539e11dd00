"""MD: the difference of two class means."""

from torch import Tensor

__all__ = ["mean_difference"]


def mean_difference(refused: Tensor, answered: Tensor) -> Tensor:
    """mean(refused) - mean(answered) [d], from the two means; it points to refusal.

    Source: Arditi et al. 2024 (arXiv:2406.11717), equation 3.
    """
    return refused - answered
