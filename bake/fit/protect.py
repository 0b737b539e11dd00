"""Keep a direction away from what must not change."""

from torch import Tensor

__all__ = ["without"]


def without(direction: Tensor, protected: Tensor, strength: float = 1.0) -> Tensor:
    """w - λ (w·r / |r|²) r [d]: the direction w less its part along the protected r.

    Source: Wang et al. 2024 (arXiv:2410.03415), the partial λ of their `ortho_lambda`.
    """
    return direction - strength * (direction @ protected) / (protected @ protected) * protected
