"""SafeSteer: the mean of the larger differences between unpaired samples."""

import torch
from torch import Tensor

from bake.fit.samples import Samples, unit

__all__ = ["norm_filtered_difference", "weighted_median"]


def norm_filtered_difference(refused: Samples, answered: Samples) -> Tensor:
    """The mean difference [d], at length 1, over pairs whose difference is longer than the median.

    Every refused sample is paired with every answered one: the method asks for no twins, and
    which of a generic pool a sample meets should not matter. Short differences say little.
    Source: SafeSteer (arXiv:2506.04250), its pruning step as reproductions restate it; there
    the samples are attention outputs averaged over the tokens, here those of the recipe.
    """
    lengths = torch.cdist(refused.values, answered.values)
    weights = refused.weights[:, None] * answered.weights[None]
    kept = weights * (lengths > weighted_median(lengths.flatten(), weights.flatten()))
    if not kept.sum() > 0:  # all pairs are equally far apart
        kept = weights
    kept = kept / kept.sum()
    difference = kept.sum(1) @ refused.values - kept.sum(0) @ answered.values
    return unit(difference, refused.mean - answered.mean)


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """The smallest value [] that at least half of the weight does not exceed."""
    order = values.argsort()
    reached = weights[order].cumsum(0) >= weights.sum() * (0.5 - 1e-12)
    return values[order][reached][0]
