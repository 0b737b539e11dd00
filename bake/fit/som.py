"""SOM directions: several ways to refuse, from a self-organising map of the refused class."""

import torch
from torch import Tensor

from bake.fit.samples import Samples
from bake.fit.span import within

__all__ = ["hexagonal", "self_organised", "som_directions"]

REACH = 0.33
ROUNDS = 200


def som_directions(refused: Samples, answered: Samples, count: int, side: int) -> Tensor:
    """At most `count` directions [k, d] of length 1, from the answered mean to neurons of a map.

    The map has `side` x `side` neurons and is fitted to the refused class; one neuron gives the
    mean difference. Neurons are taken in the order of the weight w of the samples that they
    win times the square of how far their direction d leaves the span of those taken before, so
    the first has the largest w |d|². There are fewer directions than asked for where no neuron
    is left that leaves the span. Source: SOM directions (arXiv:2511.08379), whose code sorts by
    wins and then searches the best subset by attack success; there is no search here.
    """
    neurons, wins = self_organised(refused, side)
    left = neurons - answered.mean
    shortest = 1e-3 * left.norm(dim=1).max()
    found: list[Tensor] = []
    while len(found) < min(count, left.shape[1]):
        outside = left
        if found:
            chosen = torch.stack(found)
            outside = torch.stack([one - within(chosen, one) for one in left])
        gains = wins * outside.square().sum(1)
        best = int(gains.argmax())
        if not (gains[best] > 0 and outside[best].norm() > shortest):
            break
        found.append(left[best] / left[best].norm())
    return torch.stack(found) if found else torch.zeros_like(answered.mean)


def self_organised(samples: Samples, side: int) -> tuple[Tensor, Tensor]:
    """The neurons [side², d] of a hexagonal map of the samples, and the weight [side²] each wins.

    Kohonen's batch map, at its fixed point: each neuron is the mean of all samples, weighted
    with exp(-r² / 2 σ²) of the distance r on the grid from the neuron that wins the sample,
    σ = 0.33 as in the source. It starts on the plane of the first two principal axes, and so
    needs no random numbers, no learning rate, and no order of the samples. Source: Kohonen
    1995, "Self-Organizing Maps", section 3.6.
    """
    places = hexagonal(side)
    exponents = -torch.cdist(places, places).square() / (2 * REACH**2)
    neurons = samples.mean + _spread(places) @ _plane(samples)
    winners = torch.full((len(samples.values),), -1)
    for _ in range(ROUNDS):
        # In the samples' own origin, so that distances keep their digits.
        distances = torch.cdist(samples.values - samples.mean, neurons - samples.mean)
        before, winners = winners, distances.argmin(1)
        if torch.equal(before, winners):
            break
        reached = exponents[:, winners]
        # Relative to the nearest winner, or a neuron far from all of them would divide 0 by 0.
        shares = (reached - reached.amax(1, keepdim=True)).exp() * samples.weights
        neurons = shares @ samples.values / shares.sum(1, keepdim=True)
    wins = torch.zeros(len(places), dtype=samples.weights.dtype)
    return neurons, wins.index_add(0, winners, samples.weights)


def hexagonal(side: int) -> Tensor:
    """The places [side², 2] of a hexagonal grid with a distance of 1 between neighbours."""
    numbers = torch.arange(side, dtype=torch.float64)
    row, column = torch.meshgrid(numbers, numbers, indexing="ij")
    across = column + 0.5 * (row % 2)
    return torch.stack([across.flatten(), row.flatten() * 0.75**0.5], 1)


def _spread(places: Tensor) -> Tensor:
    """The places about their middle, one standard deviation long on either axis."""
    centred = places - places.mean(0)
    return centred / centred.std(0, correction=0).clamp_min(1e-12)


def _plane(samples: Samples) -> Tensor:
    """The first two principal axes [2, d], a standard deviation long, with a sign of their own.

    An axis points to where its third moment is positive, so a turned stream turns the map.
    """
    rows = samples.centred
    _, lengths, axes = torch.linalg.svd(rows, full_matrices=False)
    lengths, axes = lengths[:2], axes[:2]
    third = samples.weights @ ((samples.values - samples.mean) @ axes.T) ** 3
    found = axes * (lengths * torch.where(third < 0, -1.0, 1.0))[:, None]
    return torch.cat([found, found.new_zeros(2 - len(found), found.shape[1])])
