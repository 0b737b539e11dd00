"""PCA of differences: the axis along which pairs of a refused and an answered prompt differ."""

import torch
from torch import Tensor

from bake.fit.samples import Samples, unit

__all__ = ["pca_of_differences", "pca_of_pairs"]


def pca_of_pairs(differences: Tensor, weights: Tensor) -> Tensor:
    """The first axis [d] of paired differences [n, d] with weights [n], about zero.

    It is the first principal component of the pairs when each is centred on its own middle,
    (h⁺ - m, h⁻ - m), since these are plus and minus half of the difference. Its sign says
    nothing. Source: CAST (arXiv:2409.05907); repeng's `pca_center`.
    """
    scaled = differences * weights.sqrt()[:, None]
    axis: Tensor = torch.linalg.svd(scaled, full_matrices=False).Vh[0]
    return axis


def pca_of_differences(refused: Samples, answered: Samples) -> Tensor:
    """The first axis [d] of every pair of one refused and one answered sample, towards refusal.

    Where topics occur in both classes only samples of one topic make a pair, as in data
    that were written in pairs. Otherwise every refused one is paired with every answered
    one; Σ (r - a)(r - a)ᵀ over all pairs is Σ refused + Σ answered + δδᵀ, so nothing has to
    be paired to find its first axis.
    """
    difference = refused.mean - answered.mean
    shared = sorted(set(refused.topics) & set(answered.topics))
    if shared:
        pairs = [_pairs(refused, answered, topic) for topic in shared]
        rows, weights = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    else:
        rows = torch.cat([refused.centred, answered.centred, difference[None]])
        weights = torch.ones(len(rows), dtype=rows.dtype)
    return unit(pca_of_pairs(rows, weights), difference)


def _pairs(refused: Samples, answered: Samples, topic: str) -> tuple[Tensor, Tensor]:
    """Differences [pairs, d] of all samples on a topic, and the products of their weights."""
    left, right = (
        torch.tensor([one == topic for one in samples.topics]) for samples in (refused, answered)
    )
    rows = refused.values[left][:, None] - answered.values[right][None]
    weights = refused.weights[left][:, None] * answered.weights[right][None]
    return rows.flatten(0, 1), weights.flatten()
