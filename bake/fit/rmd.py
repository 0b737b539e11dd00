"""RMD: the ridge-regularised mean difference; WRMD is the same on confidence weights."""

from torch import Tensor

from bake.fit.ridge import ridge_solve
from bake.fit.samples import Samples, unit

__all__ = ["rmd"]


def rmd(refused: Samples, answered: Samples, ridge: float) -> Tensor:
    """(Σ + λ I)⁻¹ (mean(refused) - mean(answered)) [d] at length 1, Σ of the answered class.

    λ = `ridge` · tr(Σ)/d; λ → ∞ gives the mean difference. Source: Refusal Steering
    (arXiv:2512.16602), whose equations two restatements give alike.
    """
    difference = refused.mean - answered.mean
    return unit(ridge_solve(answered.centred, difference, ridge), difference)
