"""Figures that rank layers and estimates without a token being generated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import torch
from torch import Tensor

from bake.errors import FitError
from bake.fit.samples import Samples

__all__ = ["Observed", "area_under_curve", "held_out", "held_out_readings", "pearson"]

FOLDS = 5


@dataclass(frozen=True, eq=False)
class Observed:
    """Prompts of a role: activations [n, d], class weights [n], and c(x) [n].

    A weight of 0 is that of a prompt that does not behave as its class does. These are all
    prompts, or some where only statistics were kept of all: then `whole` stands for the class,
    and `square` is of all activations, RᵀR = Σ x xᵀ.
    """

    values: Tensor
    weights: Tensor
    confidences: Tensor
    topics: tuple[str, ...]
    whole: Samples | None = None
    square: Tensor | None = None

    @cached_property
    def samples(self) -> Samples:
        """The class, for an estimator; raises FitError where no prompt is of it."""
        return self.whole or self.kept

    @property
    def kept(self) -> Samples:
        """The samples of the class, of those that were kept; raises FitError where none is."""
        return Samples.of(self.values, self.weights, self.topics)

    @property
    def everything(self) -> Tensor:
        """Rows R with RᵀR = Σ x xᵀ over all prompts, whatever their weights."""
        return self.values if self.square is None else self.square

    def outside(self, topics: Sequence[str]) -> Samples:
        """The class without the samples on some topics."""
        kept = torch.tensor([topic not in topics for topic in self.topics])
        return Samples.of(self.values, self.weights * kept, self.topics)


def area_under_curve(refused: Tensor, answered: Tensor) -> float:
    """The share of pairs in which the refused value is the larger; ties count half.

    This is the area under the ROC curve: 0.5 is chance, 1 is a perfect separation.
    """
    gaps = refused[:, None] - answered[None]
    return float(((gaps > 0).double() + 0.5 * (gaps == 0)).mean())


def pearson(first: Tensor, second: Tensor) -> float | None:
    """Pearson's r of two series; None where one does not vary."""
    one, other = first - first.mean(), second - second.mean()
    scale = one.norm() * other.norm()
    return float(one @ other / scale) if scale > 0 else None


def held_out(
    read: tuple[Tensor, Tensor] | None, refused: Observed, answered: Observed
) -> dict[str, float]:
    """`auc` and `r` of `held_out_readings`.

    `auc` is over the two classes, `r` against c(x) over all prompts of both roles. Figures that
    the data do not allow are left out. In place of accuracy on the fitting topics, where probes
    are perfect even for labels that mean nothing (arXiv:2603.18280). r is the layer choice of
    Refusal Steering (arXiv:2512.16602).
    """
    if read is None:
        return {}
    found = {"auc": area_under_curve(read[0][refused.weights > 0], read[1][answered.weights > 0])}
    confidences = torch.cat([refused.confidences, answered.confidences])
    r = pearson(torch.cat(read), confidences.to(torch.float64))
    return found if r is None else found | {"r": r}


def held_out_readings(
    estimate: Callable[[Samples, Samples], Tensor],
    refused: Observed,
    answered: Observed,
    folds: int = FOLDS,
) -> tuple[Tensor, Tensor] | None:
    """Projections of both roles' prompts on directions that have not seen the prompt's topic.

    Topics are dealt into folds; each fold's prompts are projected on the direction of the
    others, 0 at the answered mean and 1 at the refused one. None where the data do not allow it.
    """
    topics = sorted(set(refused.topics) | set(answered.topics), key=_digest)
    places = {topic: place % folds for place, topic in enumerate(topics)}
    first, second = (
        torch.zeros(len(one.values), dtype=torch.float64) for one in (refused, answered)
    )
    for fold in range(min(folds, len(topics))):
        left_out = [topic for topic in topics if places[topic] == fold]
        try:
            classes = refused.outside(left_out), answered.outside(left_out)
        except FitError:
            return None
        direction = estimate(*classes)
        low, high = (float(one.mean @ direction) for one in reversed(classes))
        if not high > low:
            return None
        for role, scores in ((refused, first), (answered, second)):
            rows = torch.tensor([places[topic] == fold for topic in role.topics])
            scores[rows] = (role.values[rows].to(torch.float64) @ direction - low) / (high - low)
    return first, second


def _digest(topic: str) -> str:
    return sha256(topic.encode()).hexdigest()
