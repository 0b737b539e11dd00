"""The estimators by the names that `fit.estimator` takes.

Each takes the activations of the refused and of the answered class and returns a direction
[d] of length 1 that points to refusal, or several [k, d]. `cosmic` is the mean difference, of
one layer that COSMIC's scores choose for all (`bake.fit.estimate`). Those that need the live
model, for a gradient, are in `bake.fit.learned`.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from bake.fit.category import category_direction
from bake.fit.lda import lda
from bake.fit.logistic import logistic
from bake.fit.mean_difference import mean_difference
from bake.fit.pca import pca_of_differences
from bake.fit.rmd import rmd
from bake.fit.safesteer import norm_filtered_difference
from bake.fit.samples import Samples
from bake.fit.som import som_directions
from bake.recipe import Fit

__all__ = ["ESTIMATORS"]

ESTIMATORS: Mapping[str, Callable[[Samples, Samples, Fit], Tensor]] = {
    "mean-difference": lambda refused, answered, _: mean_difference(refused, answered),
    "rmd": lambda refused, answered, fit: rmd(refused, answered, fit.ridge),
    # The same on samples that are weighted by confidence: bake.fit.wrmd.
    "wrmd": lambda refused, answered, fit: rmd(refused, answered, fit.ridge),
    "lda": lambda refused, answered, fit: lda(refused, answered, fit.ridge),
    "pca": lambda refused, answered, _: pca_of_differences(refused, answered),
    "logistic": lambda refused, answered, fit: logistic(refused, answered, fit.ridge),
    "safesteer": lambda refused, answered, _: norm_filtered_difference(refused, answered),
    "category": lambda refused, answered, fit: category_direction(refused, answered, fit.entries),
    "som": lambda refused, answered, fit: som_directions(
        refused, answered, fit.basis, fit.map_side
    ),
    "cosmic": lambda refused, answered, _: mean_difference(refused, answered),
}
