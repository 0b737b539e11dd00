"""The logistic probe: the direction that tells the two classes apart best."""

import torch
from torch import Tensor

from bake.fit.samples import Samples, unit

__all__ = ["logistic"]

STEPS = 100
CLOSE = 1e-10


def logistic(refused: Samples, answered: Samples, ridge: float) -> Tensor:
    """The weights [d], at length 1, of L2-regularised logistic regression on both classes.

    Minimises ½ Σ_k E_k log(1 + exp(-y (wᵀx + b))) + λ/2 |w|², every class with equal
    weight, by Newton's method in the span of the samples, where w must lie; b is free and
    λ = `ridge` · tr(Σ)/d over both classes. λ → ∞ gives the mean difference. The linear
    probe of steering papers (as in arXiv:2603.13359), brought to its exact minimum.
    """
    values = torch.cat([refused.values, answered.values])
    weights = torch.cat([refused.weights, answered.weights]) / 2
    signs = torch.cat([torch.ones(len(refused.values)), -torch.ones(len(answered.values))])
    centred = values - weights @ values
    # In coordinates of the samples' span there are at most as many unknowns as samples.
    _, scales, axes = torch.linalg.svd(centred, full_matrices=False)
    kept = axes[scales > 1e-9 * scales.max()]
    inner = centred @ kept.T
    scale = ridge * float(weights @ centred.square().sum(1)) / values.shape[1]
    found = _newton(inner, signs.to(inner.dtype), weights, max(scale, 1e-12))
    return unit(kept.T @ found, refused.mean - answered.mean)


def _newton(rows: Tensor, signs: Tensor, weights: Tensor, scale: float) -> Tensor:
    """The minimiser w [r] with a free intercept, by damped Newton steps to the gradient's zero."""
    design = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
    penalty = torch.full((design.shape[1],), scale, dtype=rows.dtype)
    penalty[-1] = 0.0
    found = torch.zeros(design.shape[1], dtype=rows.dtype)

    def loss(at: Tensor) -> float:
        margins = signs * (design @ at)
        penalised = penalty @ at.square() / 2
        return float(weights @ torch.nn.functional.softplus(-margins) + penalised)

    for _ in range(STEPS):
        likely = torch.sigmoid(-signs * (design @ found))
        gradient = penalty * found - design.T @ (weights * signs * likely)
        if gradient.norm() < CLOSE * (1 + found.norm()):
            break
        curvature = weights * likely * (1 - likely)
        hessian = design.T @ (curvature[:, None] * design) + torch.diag(penalty)
        # The intercept alone has no penalty, and separated classes leave it no curvature.
        hessian[-1, -1] += CLOSE
        step = torch.linalg.solve(hessian, gradient)
        length, before = 1.0, loss(found)
        while length > 1e-8 and loss(found - length * step) > before:
            length /= 2
        found = found - length * step
    return found[:-1]
