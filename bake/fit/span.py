"""The span of a layer's directions, where several take the place of one.

`directions` are [d] or [k, d] throughout: one is a span of one dimension.
"""

import torch
from torch import Tensor

__all__ = ["alikeness", "frame", "independent", "rows_of", "within"]

# Of its length, what is left of a direction outside the span of others and still says something.
OUTSIDE = 1e-3


def rows_of(directions: Tensor) -> Tensor:
    """The directions as rows [k, d], also where there is one [d]."""
    return directions if directions.ndim > 1 else directions[None]


def frame(directions: Tensor) -> Tensor:
    """Orthonormal rows [.., k, d] with the span of `directions` [.., k, d], by Gram and Schmidt.

    Each points to the side of its own direction. Gradients pass through.
    """
    axes, heights = torch.linalg.qr(directions.mT)
    signs = torch.where(heights.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    rows: Tensor = (axes * signs[..., None, :]).mT
    return rows


def within(directions: Tensor, vector: Tensor) -> Tensor:
    """The part [d] of a vector [d] that lies in the span."""
    rows = frame(rows_of(directions))
    part: Tensor = (rows @ vector) @ rows
    return part


def independent(directions: Tensor) -> Tensor:
    """Those of the rows [k, d] that are not within the span of the ones before them."""
    kept: list[Tensor] = []
    for row in directions:
        inside = within(torch.stack(kept), row) if kept else torch.zeros_like(row)
        if (row - inside).norm() > OUTSIDE * row.norm():
            kept.append(row)
    return torch.stack(kept) if kept else directions[:0]


def alikeness(one: Tensor, other: Tensor) -> float:
    """The cosine of two directions, or of two spans the mean cosine of their principal angles.

    The mean is over the dimensions of the first. 1 is the same span, and 0 an orthogonal one;
    by chance k of d dimensions give about the square root of k / d.
    """
    if one.ndim == other.ndim == 1:
        return float(one @ other / (one.norm() * other.norm()).clamp_min(1e-300))
    first = frame(rows_of(one))
    angles: Tensor = torch.linalg.svdvals(first @ frame(rows_of(other)).mT)
    return float(angles.sum()) / len(first)
