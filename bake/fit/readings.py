"""How far along a direction the prompts of every role lie, as histograms."""

from typing import Final

import torch
from torch import Tensor

__all__ = ["BINS", "HIGH", "LOW", "counted", "read"]

# Readings count in gaps between the two classes: 0 is the answered mean, 1 the refused one.
LOW: Final = -1.0
HIGH: Final = 2.0
BINS: Final = 30


def read(values: Tensor, answered: Tensor, gap: Tensor) -> Tensor:
    """The readings [n] of activations [n, d] along `gap` [d], from the answered mean [d].

    `gap` is the part of the way from the answered mean to the refused one that lies along the
    direction, so that the refused mean reads 1.
    """
    readings: Tensor = (values.to(gap.dtype) - answered) @ gap / (gap @ gap)
    return readings


def counted(readings: Tensor) -> tuple[int, ...]:
    """How many readings fall into each of BINS equal bins; what is outside is in the nearest."""
    places = ((readings - LOW) / (HIGH - LOW) * BINS).floor().clamp(0, BINS - 1).long()
    counts: list[int] = torch.bincount(places, minlength=BINS).tolist()
    return tuple(counts)
