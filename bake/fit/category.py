"""Category directions: the sparse difference that one kind of refusal makes."""

import torch
from torch import Tensor

from bake.fit.samples import Samples, unit

__all__ = ["category_direction", "sparse"]

NOTHING = 1e-3


def category_direction(refused: Samples, answered: Samples, entries: int) -> Tensor:
    """The mean difference [d], kept to its largest entries, at length 1.

    The category is what the refused class is of. Source: "From Refusal Tokens to Refusal
    Control" (arXiv:2603.13359), steering_vectors.py of its code: s_k from pairs that differ
    in a refusal token; entries below 1e-3 dropped, the 200 largest kept, then normalised.
    """
    difference = refused.mean - answered.mean
    return unit(sparse(difference, entries), difference)


def sparse(vector: Tensor, entries: int, nothing: float = NOTHING) -> Tensor:
    """The vector [d] with all but its `entries` largest entries 0, and those below `nothing`.

    `nothing` counts in the root mean square of the entries, so that it travels between
    models; in the source it is absolute.
    """
    sizes = vector.abs()
    limit = nothing * float(vector.square().mean().sqrt())
    kept = torch.zeros_like(vector)
    largest = sizes.topk(min(entries, len(vector))).indices
    kept[largest] = vector[largest]
    return torch.where(sizes < limit, torch.zeros_like(vector), kept)
