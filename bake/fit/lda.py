"""LDA: the mean difference between two whitened classes, back in the stream's coordinates."""

import torch
from torch import Tensor

from bake.fit.ridge import ridge_solve
from bake.fit.samples import Samples, unit

__all__ = ["lda"]


def lda(refused: Samples, answered: Samples, ridge: float) -> Tensor:
    """(S + λ I)⁻¹ (mean(refused) - mean(answered)) [d] at length 1, S of both classes alike.

    S = (Σ refused + Σ answered) / 2 and λ = `ridge` · tr(S)/d. With W = (S + λ I)^(-1/2) this
    is W (W δ): the difference of the whitened means, whitened back. λ → ∞ gives the mean
    difference. Source: Fisher 1936, "The use of multiple measurements in taxonomic problems".
    """
    difference = refused.mean - answered.mean
    rows = torch.cat([refused.centred, answered.centred]) / 2**0.5
    return unit(ridge_solve(rows, difference, ridge), difference)
