"""What is kept of the stream where directions are measured: statistics, samples where they count.

Of a class that is larger than the limits below there stay its mean and, where the estimator
asks for it, its covariance. Samples of every prompt stay for these estimators alone:

- `logistic` comes back to each sample in every step of its minimisation;
- `safesteer` needs the median over all pairs before it can weigh any of them;
- `pca` pairs the samples of a topic, and the sums that stand for them are as many as topics.

The figures (`auc`, `r`, `spread`) resample and hold out topics, so they are of samples too: of
all where there are few, and else of a fixed number of prompts.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch

from bake.activations import Conversation, Keep, Moments, Tap
from bake.fit.labels import Labelled
from bake.fit.place import Place
from bake.fit.samples import Samples, factor
from bake.fit.scores import Observed
from bake.recipe import Fit

__all__ = ["FIGURED", "observed", "stream_taps", "watching_taps"]

# Prompts of a class, and of the others of its role, that the figures are of at least.
FIGURED: Final = 256
OF_MEANS: Final = frozenset({"mean-difference", "category", "cosmic"})
OF_COVARIANCES: Final = frozenset({"rmd", "wrmd", "lda"})


def stream_taps(
    place: Place,
    layers: Iterable[int],
    choice: Fit,
    role: str,
    conversations: Sequence[Conversation],
    width: int,
) -> dict[Any, Tap]:
    """What to read at a place in some blocks for the direction, of one role's conversations.

    `width` is the stream's.
    """
    rows = _rows(choice, role, [one.weight > 0 for one in conversations], width)
    whole = len(rows) == len(conversations)
    covariance = role in (choice.refused, choice.contrast) and choice.estimator in OF_COVARIANCES
    taps: dict[Any, Tap] = {}
    for layer in layers:
        keep: Keep = "covariance" if covariance and not whole else "mean"
        taps[layer] = place.tap(layer, "last", keep, rows)
        if _in_null_space(choice, role) and not whole:
            taps[f"all {layer}"] = place.tap(layer, "every last", "covariance")
    return taps


def watching_taps(place: Place, layers: Iterable[int], count: int) -> dict[Any, Tap]:
    """What to read of a role whose `count` prompts pass anyway and make no direction.

    Some samples, to show where they lie along it.
    """
    rows = tuple(range(min(count, FIGURED)))
    return {layer: place.tap(layer, "last", "mean", rows) for layer in layers}


def observed(
    moments: Mapping[Any, Moments],
    layer: int,
    conversations: Sequence[Conversation],
    labels: Sequence[Labelled],
) -> Observed:
    """What `stream_taps` left behind a layer of the prompts of a role."""
    found = moments[layer]
    weights = [conversations[row].weight for row in found.rows]
    confidences = [labels[row].confidence for row in found.rows]
    whole = square = None
    if len(found.rows) < len(conversations) and found.weight > 0:
        covariance = found.covariance if found.keep == "covariance" else None
        whole = Samples.standing_for(found.mean, covariance)
    if f"all {layer}" in moments:
        every = moments[f"all {layer}"]
        square = factor(every.gram * every.weight)
    return Observed(
        found.values if found.rows else torch.zeros(0, len(found.mean)),
        torch.tensor(weights, dtype=torch.float64),
        torch.tensor(confidences, dtype=torch.float64),
        tuple(labels[row].prompt.topic for row in found.rows),
        whole,
        square,
    )


def _rows(choice: Fit, role: str, members: Sequence[bool], width: int) -> tuple[int, ...]:
    """The conversations whose samples stay: so many that are of the class, and that are not."""
    if role in (choice.refused, choice.contrast):
        if choice.estimator not in OF_MEANS | OF_COVARIANCES:
            return tuple(range(len(members)))
        # Up to the width, samples are smaller than their covariance.
        limit = max(FIGURED, width if choice.estimator in OF_COVARIANCES else 0)
    elif _in_null_space(choice, role):
        limit = width
    else:
        return ()
    parts = [[row for row, one in enumerate(members) if one == side] for side in (True, False)]
    return tuple(sorted(row for part in parts for row in part[:limit]))


def _in_null_space(choice: Fit, role: str) -> bool:
    return choice.protect == "null-space" and role in ("protected", "general")
