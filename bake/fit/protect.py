"""Keep a direction, or a probe, away from what must not change."""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["STILL", "busiest", "in_null_space", "still", "unread", "without", "without_concepts"]

STILL = ("general", "text")  # the classes in whose null space a probe may be


def without(direction: Tensor, protected: Tensor, strength: float = 1.0) -> Tensor:
    """w - λ (w·r / |r|²) r [d]: the direction w less its part along the protected r.

    Source: Wang et al. 2024 (arXiv:2410.03415), the partial λ of their `ortho_lambda`.
    """
    square = protected @ protected
    if not square > 0:
        return direction
    return direction - strength * (direction @ protected) / square * protected


def without_concepts(direction: Tensor, concepts: Tensor, ridge: float) -> Tensor:
    """r - A (AᵀA + ρ I)⁻¹ Aᵀ r [d]: the direction less what the concepts' directions explain.

    A is `concepts` [d, m] with its columns at length 1, so that ρ = `ridge` is in units of
    their squares. ρ → 0 removes their span; a larger ρ spares what a concept explains only
    together with many others. Source: SRA (arXiv:2601.08489), ridge residualisation.
    """
    atoms = concepts / concepts.norm(dim=0).clamp_min(torch.finfo(concepts.dtype).tiny)
    gram = atoms.T @ atoms + ridge * torch.eye(atoms.shape[1], dtype=atoms.dtype)
    explained: Tensor = atoms @ torch.linalg.solve(gram, atoms.T @ direction)
    return direction - explained


def busiest(activations: Tensor, share: float) -> Tensor:
    """The axes [k, d] along which activations [n, d] are large: all but the `share` of smallest.

    They are right singular vectors, about zero; k is at most n and (1 - share) d.
    """
    width = activations.shape[1]
    axes: Tensor = torch.linalg.svd(activations, full_matrices=False).Vh
    return axes[: width - round(share * width)]


def still(moments: Mapping[str, Tensor]) -> Tensor:
    """Of the classes' E a aᵀ [d, d] the sum over those that are not to be steered at all."""
    return torch.stack([moments[role] for role in STILL if role in moments]).sum(0)


def unread(gram: Tensor, share: float) -> Tensor:
    """The axes U [k, d] that a gate's probe does not read: as `busiest`, of E a aᵀ [d, d].

    At least one is left to read, however small the share.
    """
    axes: Tensor = torch.linalg.eigh(gram).eigenvectors
    return axes[:, max(1, round(share * len(gram))) :].T


def in_null_space(direction: Tensor, axes: Tensor) -> Tensor:
    """P r [d], P = I - UᵀU onto what is orthogonal to the busiest axes U [k, d].

    Source: AlphaSteer (arXiv:2506.07022), where P, of benign prompts, stands in front of the
    steering, so that these prompts are not steered.
    """
    return direction - axes.T @ (axes @ direction)
