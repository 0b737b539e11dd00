"""RMD: the ridge-regularised mean difference, in its primal and dual form."""

import torch
from torch import Tensor

from bake.fit.mean_difference import mean_difference

__all__ = ["rmd", "rmd_dual"]


def rmd(refused: Tensor, answered: Tensor, covariance: Tensor, ridge: float) -> Tensor:
    """(Σ + λ I)⁻¹ (mean(refused) - mean(answered)) [d], Σ [d, d] of the answered class.

    λ = `ridge` · tr(Σ)/d, so that one number travels between layers and models.
    λ → ∞ gives the direction of the mean difference. Source: Refusal Steering
    (arXiv:2512.16602), whose equations two restatements give alike (METHODS.md 1.4).
    """
    width = covariance.shape[0]
    scale = ridge * covariance.diagonal().sum() / width
    eye = torch.eye(width, dtype=covariance.dtype)
    difference = mean_difference(refused, answered)
    direction: Tensor = torch.linalg.solve(covariance + scale * eye, difference)
    return direction


def rmd_dual(refused: Tensor, answered: Tensor, centred: Tensor, ridge: float) -> Tensor:
    """`rmd` with Σ = XᵀX from its n rows X = `centred` [n, d]; exact, and n × n where n < d.

    v = (δ - Xᵀ (λ I + X Xᵀ)⁻¹ X δ) / λ, by the Woodbury identity.
    """
    difference = mean_difference(refused, answered)
    count, width = centred.shape
    scale = ridge * centred.square().sum() / width
    inner = centred @ centred.T + scale * torch.eye(count, dtype=centred.dtype)
    solved: Tensor = torch.linalg.solve(inner, centred @ difference)
    return (difference - centred.T @ solved) / scale
