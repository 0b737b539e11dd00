"""The ridge readout behind a rank-one gate."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ReadoutClass", "ridge_readout", "ridge_solutions"]


@dataclass(frozen=True, eq=False)
class ReadoutClass:
    """One class of inputs a: mean [d], E a aᵀ [d, d], and the value that the probe shall read."""

    mean: Tensor
    gram: Tensor
    value: float


def ridge_readout(
    classes: Sequence[ReadoutClass], ridge: float, unseen: Tensor | None = None
) -> Tensor:
    """The probe c [d] = argmin Σ_k E_k (cᵀa - y_k)² + λ |c|², every class with equal weight.

    λ = `ridge` times the mean of the diagonal of Σ_k G_k. Closed form:
    c = (Σ_k G_k + λ I)⁻¹ Σ_k y_k m_k, or as `ridge_solutions` where some axes are `unseen`.
    """
    gram = torch.stack([one.gram for one in classes]).sum(0)
    wanted = torch.stack([one.value * one.mean for one in classes]).sum(0)
    return ridge_solutions(gram, wanted[None], ridge, unseen)[0]


def ridge_solutions(
    gram: Tensor, wanted: Tensor, ridge: float, unseen: Tensor | None = None
) -> Tensor:
    """(G + λ I)⁻¹ w [k, d] of each row of `wanted` [k, d], λ as in `ridge_readout`.

    A readout is linear in what it shall read: of the classes' means for w, c = Σ_k y_k c_k.
    Across the orthonormal axes `unseen` U [m, d] it is (P G P + λ I)⁻¹ P w with P = I - UᵀU,
    the minimum among probes that read nothing along them; λ is of the diagonal of P G P.
    """
    if unseen is not None:
        seen = torch.eye(len(gram), dtype=gram.dtype) - unseen.T @ unseen
        gram, wanted = seen @ gram @ seen, wanted @ seen
    scale = ridge * gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype)
    found: Tensor = torch.linalg.solve(gram + scale * eye, wanted.T).T
    return found
