"""How far an estimate moves when the data are drawn again."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from bake.fit.samples import Samples
from bake.fit.span import alikeness

__all__ = ["bootstrap_cosine"]


def bootstrap_cosine(
    estimate: Callable[[Samples, Samples], Tensor],
    refused: Samples,
    answered: Samples,
    resamples: int,
    seed: int,
) -> float:
    """The mean cosine of resampled directions with the estimate: 1 is firm, near 0 is noise.

    Of several directions [k, d] it is that of the principal angles between the spans.

    Topics are drawn with replacement, as many as there are, in each class: samples of one
    topic are no independent evidence. The same seed gives the same figure. Source: Efron
    1979, "Bootstrap methods", over clusters.
    """
    whole = estimate(refused, answered)
    generator = torch.Generator().manual_seed(seed)
    cosines = []
    for _ in range(resamples):
        counts = _drawn(refused.groups, generator)
        others = _drawn(answered.groups, generator)
        # Classes that were written in pairs are drawn in pairs.
        shared = {topic: counts[topic] for topic in set(refused.topics) & set(answered.topics)}
        again = estimate(_again(refused, counts), _again(answered, others | shared))
        cosines.append(alikeness(whole, again))
    return sum(cosines) / len(cosines)


def _drawn(topics: Sequence[str], generator: torch.Generator) -> dict[str, int]:
    """How often each topic comes up in as many draws as there are topics."""
    names = list(dict.fromkeys(topics))
    drawn = torch.randint(len(names), (len(names),), generator=generator)
    counts: list[int] = torch.bincount(drawn, minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=True))


def _again(samples: Samples, counts: Mapping[str, int]) -> Samples:
    """The samples, each as often as its topic was drawn; as they are where none was."""
    factors = torch.tensor([float(counts[topic]) for topic in samples.groups])
    return samples.reweighted(factors) if factors.any() else samples
