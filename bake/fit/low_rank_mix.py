"""The learned low-rank mix of category directions, in a whitened orthonormal basis."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["learned_mix", "mixing_basis", "whitened"]

RATE = 1e-2
START = 0.01
CLIP = 1.0


def whitened(vectors: Tensor, rows: Tensor, ridge: float) -> Tensor:
    """(XᵀX + ε I)^(-1/2) s for every s of `vectors` [m, d], X = `rows` [n, d], as rows [m, d].

    It is the ZCA map of samples whose centred rows are X. ε = `ridge` · tr(XᵀX)/d, which
    travels between layers; in the source it is 1e-4.
    """
    scale = ridge * float(rows.square().sum()) / rows.shape[1]
    if scale == 0:
        return vectors
    _, lengths, axes = torch.linalg.svd(rows, full_matrices=False)
    # Along the axes that the samples do not reach the variance is ε alone.
    outside = scale**-0.5
    factors = (lengths.square() + scale) ** -0.5 - outside
    found: Tensor = outside * vectors + (vectors @ axes.T * factors) @ axes
    return found


def mixing_basis(vectors: Tensor, rows: Tensor, ridge: float) -> Tensor:
    """Q [d, m], orthonormal columns: QR of the whitened category directions `vectors` [m, d].

    Source: "From Refusal Tokens to Refusal Control" (arXiv:2603.13359), low_rank_combination.py
    of its code.
    """
    basis: Tensor = torch.linalg.qr(whitened(vectors, rows, ridge).T).Q
    return basis


def learned_mix(
    loss: Callable[[Tensor, int], Tensor], basis: Tensor, length: float, steps: int, seed: int
) -> Tensor:
    """v = U Vᵀ z [d] times `length` that `loss(v, step)` is least for, by gradient.

    U and V start as `basis` Q [d, m] and z [d] as 0.01 N(0, I), so v leaves Q's span only by
    what is learned. `length` is a class gap, so that the rate (AdamW, 0.01, clipped at norm 1)
    means the same for every layer; in the source it is 0.001 for five passes over its data, in
    the stream's own units. The same seed gives the same mix. Source: as `mixing_basis`.
    """
    generator = torch.Generator().manual_seed(seed)
    left, right = (basis.detach().clone().requires_grad_() for _ in range(2))
    noise = torch.randn(len(basis), generator=generator, dtype=basis.dtype)
    inner = (START * noise).requires_grad_()
    learned = [left, right, inner]
    optimiser = torch.optim.AdamW(learned, lr=RATE)
    for step in range(steps):
        optimiser.zero_grad()
        torch.autograd.backward(loss(length * left @ (right.T @ inner), step))
        torch.nn.utils.clip_grad_norm_(learned, CLIP)
        optimiser.step()
    return (length * left @ (right.T @ inner)).detach()
