"""How far an estimate moves when the data are drawn again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from bake.fit.samples import Samples
from bake.fit.span import alikeness

__all__ = ["Draw", "as_drawn", "bootstrap_cosine", "draws"]

# How often each topic of a class comes up.
Draw: TypeAlias = Mapping[str, int]


def bootstrap_cosine(
    estimate: Callable[[Samples, Samples], Tensor],
    refused: Samples,
    answered: Samples,
    resamples: int,
    seed: int,
) -> float:
    """The mean cosine of resampled directions with the estimate: 1 is firm, near 0 is noise.

    Of several directions [k, d] it is that of the principal angles between the spans. The draws
    are those of `draws`; the same seed gives the same figure.
    """
    whole = estimate(refused, answered)
    cosines = [
        alikeness(whole, estimate(as_drawn(refused, first), as_drawn(answered, second)))
        for first, second in draws(refused, answered, resamples, seed)
    ]
    return sum(cosines) / len(cosines)


def draws(
    refused: Samples, answered: Samples, resamples: int, seed: int
) -> Iterator[tuple[Draw, Draw]]:
    """Topics of both classes, drawn with replacement, in each as many as there are.

    Samples of one topic are no independent evidence. Source: Efron 1979, "Bootstrap methods",
    over clusters.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(resamples):
        counts = _drawn(refused.groups, generator)
        others = _drawn(answered.groups, generator)
        # Classes that were written in pairs are drawn in pairs.
        shared = {topic: counts[topic] for topic in set(refused.topics) & set(answered.topics)}
        yield counts, others | shared


def _drawn(topics: Sequence[str], generator: torch.Generator) -> dict[str, int]:
    """How often each topic comes up in as many draws as there are topics."""
    names = list(dict.fromkeys(topics))
    drawn = torch.randint(len(names), (len(names),), generator=generator)
    counts: list[int] = torch.bincount(drawn, minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=True))


def as_drawn(samples: Samples, counts: Draw) -> Samples:
    """The samples, each as often as its topic was drawn; as they are where none was."""
    factors = torch.tensor([float(counts[topic]) for topic in samples.groups])
    return samples.reweighted(factors) if factors.any() else samples
