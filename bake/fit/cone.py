"""A concept cone: an orthonormal basis whose every mixture with positive shares steers alike."""

from collections.abc import Callable

import torch
from torch import Tensor

from bake.fit.span import frame

__all__ = ["cone_basis", "mixtures"]

RATE = 1e-2


def cone_basis(
    loss: Callable[[Tensor, int], Tensor], start: Tensor, steps: int, batch: int, seed: int
) -> Tensor:
    """The orthonormal basis [k, d] that `loss` is least for, from `start` [k, d], by gradient.

    `loss(directions, step)` takes unit directions [batch, d], one for each prompt of a batch,
    and returns their mean loss []. Half of them are the basis vectors in turn, half random unit
    vectors of the cone that they span with positive shares, so the loss falls on all of it.
    Of the gradient only what turns the basis is followed (Edelman et al. 1998,
    arXiv:physics/9806030, eq. 2.4: G - sym(G Bᵀ) B), and the basis made orthonormal again after
    every step: what pulls two vectors to one place would otherwise be all that Adam sees. A
    cone of one vector is a refusal direction by gradient (RDO). The same seed gives the same
    basis. Source: Wollschläger et al. 2025 (arXiv:2502.17420), whose code takes 8 to 16 mixtures
    for every batch; here each prompt of a batch has its own.
    """
    generator = torch.Generator().manual_seed(seed)
    basis = frame(start).detach().clone().requires_grad_()
    optimiser = torch.optim.AdamW([basis], lr=RATE)
    for step in range(steps):
        optimiser.zero_grad()
        torch.autograd.backward(loss(mixtures(basis, batch, generator), step))
        assert basis.grad is not None
        with torch.no_grad():
            turned = basis.grad @ basis.T
            basis.grad -= (turned + turned.T) / 2 @ basis
            optimiser.step()
            basis.copy_(frame(basis))
    return basis.detach()


def mixtures(basis: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` unit vectors [count, d]: the basis vectors in turn, every other one a mixture.

    A mixture's shares are those of a random point on the positive part of the unit sphere. Of
    a single vector there are none.
    """
    size = len(basis)
    turns = torch.arange(count) % size if size == 1 else torch.arange(count) // 2 % size
    shares = torch.eye(size, dtype=basis.dtype)[turns]
    if size > 1:
        drawn = torch.randn(count, size, generator=generator, dtype=basis.dtype).abs()
        shares[1::2] = (drawn / drawn.norm(dim=1, keepdim=True))[1::2]
    return shares @ basis
