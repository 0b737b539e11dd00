"""How the directions of several kinds of refusal lie to each other, and what to hold them to."""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["cosines", "generic", "of_length", "random_direction"]


def cosines(directions: Mapping[str, Tensor]) -> list[list[float]]:
    """The cosine of every direction [d] with every other, in their order."""
    rows = torch.stack([one / one.norm() for one in directions.values()])
    found: list[list[float]] = (rows @ rows.T).tolist()
    return found


def generic(means: Mapping[str, Tensor], answered: Tensor) -> Tensor:
    """The direction [d] of refusal as such: from the answered mean to the mean of all kinds.

    Every kind counts alike, however many prompts it has.
    """
    return torch.stack(list(means.values())).mean(0) - answered


def random_direction(width: int, seed: int) -> Tensor:
    """A direction [d] drawn evenly from all there are; the same seed gives the same one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, generator=generator, dtype=torch.float64)


def of_length(directions: Mapping[str, Tensor], length: float) -> dict[str, Tensor]:
    """The directions, all of one length, so that one strength moves the stream as far along each.

    Compared at the length of their own gaps, a direction looks selective that is only short.
    """
    return {name: one * (length / float(one.norm())) for name, one in directions.items()}
