"""Keep a direction away from what must not change."""

import torch
from torch import Tensor

__all__ = ["in_null_space", "without", "without_concepts"]


def without(direction: Tensor, protected: Tensor, strength: float = 1.0) -> Tensor:
    """w - λ (w·r / |r|²) r [d]: the direction w less its part along the protected r.

    Source: Wang et al. 2024 (arXiv:2410.03415), the partial λ of their `ortho_lambda`.
    """
    return direction - strength * (direction @ protected) / (protected @ protected) * protected


def without_concepts(direction: Tensor, concepts: Tensor, ridge: float) -> Tensor:
    """r - A (AᵀA + ρ I)⁻¹ Aᵀ r [d]: the direction less what the concepts' directions explain.

    A is `concepts` [d, m] with its columns at length 1, so that ρ = `ridge` is in units of
    their squares. ρ → 0 removes their span; a larger ρ spares what a concept explains only
    together with many others. Source: SRA (arXiv:2601.08489), ridge residualisation.
    """
    atoms = concepts / concepts.norm(dim=0)
    gram = atoms.T @ atoms + ridge * torch.eye(atoms.shape[1], dtype=atoms.dtype)
    explained: Tensor = atoms @ torch.linalg.solve(gram, atoms.T @ direction)
    return direction - explained


def in_null_space(direction: Tensor, activations: Tensor, share: float) -> Tensor:
    """P r [d], P onto the `share` of all d dimensions where the activations [n, d] are smallest.

    The dimensions are right singular vectors of the activations, about zero, as in
    AlphaSteer (arXiv:2506.07022), where P stands in front of the steering of benign prompts.
    """
    width = activations.shape[1]
    axes = torch.linalg.svd(activations, full_matrices=False).Vh
    largest: Tensor = axes[: width - round(share * width)]
    return direction - largest.T @ (largest @ direction)
