"""The activations of one class, as every estimator takes them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bake.errors import FitError

__all__ = ["Samples", "factor", "unit"]


@dataclass(frozen=True, eq=False)
class Samples:
    """Activations [n, d] in float64 and their weights [n], which are above 0 and sum to 1.

    `topics` are what the samples are about, empty where nobody says: those of one topic are
    resampled and held out together.
    """

    values: Tensor
    weights: Tensor
    topics: tuple[str, ...]

    @classmethod
    def of(
        cls,
        values: Tensor,
        weights: Tensor | None = None,
        topics: Sequence[str] | None = None,
    ) -> "Samples":
        """Samples with any weights from 0 up; those of weight 0 are left out.

        Without weights all count alike. Raises
        FitError for an activation that is not finite, and for a class that is empty.
        """
        if not torch.isfinite(values).all():
            raise FitError("activations are not finite; the model may need float32 or bfloat16")
        count = len(values)
        given = torch.ones(count) if weights is None else weights
        kept = given > 0
        if not kept.any():
            raise FitError("no sample of this class is left; see the labels of the base's answers")
        shares = given[kept].to(torch.float64)
        pairs = zip(topics, kept.tolist(), strict=True) if topics else ()
        chosen = tuple(topic for topic, keep in pairs if keep)
        return cls(values[kept].to(torch.float64), shares / shares.sum(), chosen)

    @classmethod
    def standing_for(cls, mean: Tensor, covariance: Tensor | None = None) -> "Samples":
        """Samples with this mean [d] and covariance [d, d], or with no spread where none is given.

        An estimator that asks for no more cannot tell them from the class itself.
        """
        spread = mean.new_zeros(0, len(mean)) if covariance is None else factor(covariance)
        if not len(spread):
            return cls(mean[None], mean.new_ones(1), ())
        reach = spread * len(spread) ** 0.5
        count = 2 * len(spread)
        weights = mean.new_full((count,), 1 / count)
        return cls(torch.cat([mean + reach, mean - reach]), weights, ())

    @property
    def groups(self) -> tuple[str, ...]:
        """The topics, or where nobody says them the samples' own numbers."""
        return self.topics or tuple(map(str, range(len(self.values))))

    @property
    def mean(self) -> Tensor:
        """The weighted mean [d]."""
        return self.weights @ self.values

    @property
    def centred(self) -> Tensor:
        """The rows sqrt(w) (x - mean) [n, d]: covariance = centredᵀ centred."""
        return (self.values - self.mean) * self.weights.sqrt()[:, None]

    def reweighted(self, factors: Tensor) -> "Samples":
        """The same samples with their weights times factors [n] from 0 up."""
        return Samples.of(self.values, self.weights * factors, self.topics)


def factor(square: Tensor) -> Tensor:
    """Rows R [r, d] with RᵀR = `square` [d, d], which is symmetric and has no negative axis."""
    sizes, axes = torch.linalg.eigh(square)
    # What is smaller is the rounding of the largest.
    kept = sizes > sizes[-1].clamp_min(0) * len(sizes) * torch.finfo(square.dtype).eps
    rows: Tensor = (axes[:, kept] * sizes[kept].sqrt()).T
    return rows


def unit(direction: Tensor, towards: Tensor) -> Tensor:
    """The direction [d] at length 1, turned so that its product with `towards` is not negative.

    One of length 0 stays as it is: the caller names what has no direction.
    """
    length = direction.norm()
    if not length > 0:
        return direction
    sign = -1.0 if direction @ towards < 0 else 1.0
    scaled: Tensor = direction * (sign / length)
    return scaled
