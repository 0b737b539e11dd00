"""(XᵀX + λ I)⁻¹ δ, in its primal and its dual form."""

import torch
from torch import Tensor

__all__ = ["ridge_solve", "solve_dual", "solve_primal"]


def ridge_solve(rows: Tensor, vector: Tensor, ridge: float) -> Tensor:
    """(XᵀX + λ I)⁻¹ δ [d] for X = `rows` [n, d], λ = `ridge` · tr(XᵀX)/d, in the smaller form.

    In units of the mean variance one number travels between layers and models. Where X is
    all zeros there is nothing to divide by, and δ itself is returned.
    """
    count, width = rows.shape
    scale = ridge * float(rows.square().sum()) / width
    if scale == 0:
        return vector
    return (solve_dual if count < width else solve_primal)(rows, vector, scale)


def solve_primal(rows: Tensor, vector: Tensor, scale: float) -> Tensor:
    """(XᵀX + λ I)⁻¹ δ with λ = `scale`, by a system of d equations."""
    gram = rows.T @ rows + scale * torch.eye(rows.shape[1], dtype=rows.dtype)
    solved: Tensor = torch.linalg.solve(gram, vector)
    return solved


def solve_dual(rows: Tensor, vector: Tensor, scale: float) -> Tensor:
    """The same by a system of n equations: (δ - Xᵀ (λ I + X Xᵀ)⁻¹ X δ) / λ.

    It is the Woodbury identity, and exact.
    """
    gram = rows @ rows.T + scale * torch.eye(rows.shape[0], dtype=rows.dtype)
    solved: Tensor = torch.linalg.solve(gram, rows @ vector)
    return (vector - rows.T @ solved) / scale
