"""From the activations of every role to the directions of a layer, protected, with figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from bake.directions import Directions
from bake.directions.value import Origin
from bake.errors import FitError
from bake.fit.cosmic import CosmicScores
from bake.fit.estimators import ESTIMATORS
from bake.fit.first_token import FirstToken
from bake.fit.protect import busiest, in_null_space, without, without_concepts
from bake.fit.readings import counted, read
from bake.fit.samples import Samples
from bake.fit.scores import Observed, held_out, held_out_readings
from bake.fit.select import DEPTH, DIVERGENCE
from bake.fit.span import alikeness, independent, rows_of, within
from bake.fit.spread import Draw, bootstrap_cosine, draws
from bake.recipe import Fit, Recipe

__all__ = ["Activations", "estimated", "roles_of_direction", "roles_shown"]

Activations = Mapping[str, Mapping[int, Observed]]
Estimate = Callable[[Samples, Samples], Tensor]
Protect = Callable[[Tensor, Samples], Tensor]
# Directions of a layer, learned on the live model from all prompts or from topics drawn again.
Learn = Callable[[int, tuple[Draw, Draw] | None], Tensor]
# Below this share of the estimate a protected direction is rounding.
NOTHING_LEFT = 1e-6


def roles_of_direction(choice: Fit) -> set[str]:
    """The roles whose behaviour makes the direction."""
    roles: set[str] = {choice.refused, choice.contrast}
    if choice.protect in ("remove", "residual") or choice.estimator == "low-rank-mix":
        roles.add("protected")
    return roles


def roles_shown(choice: Fit) -> set[str]:
    """The roles whose prompts have to be measured for the direction."""
    shown = {"protected", "general"} if choice.protect == "null-space" else set()
    return roles_of_direction(choice) | shown


def estimated(
    recipe: Recipe,
    found: Activations,
    concepts: Activations,
    layers: Sequence[int],
    cosmic: CosmicScores | None = None,
    first_token: FirstToken | None = None,
    learn: Learn | None = None,
    figured: bool = True,
) -> Directions:
    """The direction of every layer, as long as the gap between the two classes along it.

    A strength of 1 therefore moves the answered class's mean to the refused one's, measured
    along the direction; several of a layer are each as long as the gap within their span.
    `learn` gives the directions of a layer where that takes the live model. Where one layer's
    are those of all, the lengths are still each layer's own. Each comes with
    its figures: `spread`, `auc`, `r`, and those that `cosmic` and `first_token` give, and with
    histograms of all roles in `found`. What is learned has no `auc`, no `r` and no histograms,
    which would learn it anew for every fold. They have nothing of it where not `figured`. Raises
    FitError where the data determine no direction.
    """
    refused, answered = found[recipe.fit.refused], found[recipe.fit.contrast]

    def estimator(layer: int, drawn: tuple[Draw, Draw] | None = None) -> Estimate:
        learned = partial(learn, layer, drawn) if learn else None
        protection = _protection(recipe.fit, found, concepts, layer)
        return partial(_directions, learned, recipe.fit, protection)

    estimates = {layer: estimator(layer) for layer in refused}
    samples = {layer: (refused[layer].samples, answered[layer].samples) for layer in refused}
    chosen = None
    if recipe.fit.estimator == "cosmic":
        assert cosmic is not None and first_token is not None
        chosen = _chosen_by_cosmic(recipe.fit, estimates, samples, cosmic, first_token)
    elif recipe.fit.layer is not None:
        own = recipe.fit.layer
        chosen = _Chosen(own, _checked(recipe.fit, estimates[own], samples[own], own))
    if chosen:
        units = dict.fromkeys(layers, chosen.direction)
    else:
        units = {
            layer: _checked(recipe.fit, estimates[layer], samples[layer], layer) for layer in layers
        }

    @cache
    def readings_of(layer: int) -> tuple[Tensor, Tensor] | None:
        reading = partial(_reading, estimates[layer])
        return None if learn else held_out_readings(reading, refused[layer], answered[layer])

    @cache
    def figures_of(layer: int) -> dict[str, float]:
        resamples, seed = recipe.fit.resamples, recipe.seed
        classes = refused[layer].kept, answered[layer].kept
        if learn:
            whole = chosen.direction if chosen else units[layer]
            cosines = [
                alikeness(whole, estimator(layer, drawn)(*classes))
                for drawn in draws(*classes, resamples, seed)
            ]
            return {"spread": sum(cosines) / resamples} if resamples else {}
        found = held_out(readings_of(layer), refused[layer], answered[layer])
        if resamples:
            found["spread"] = bootstrap_cosine(estimates[layer], *classes, resamples, seed)
        return found

    vectors: dict[int, Tensor] = {}
    figures: dict[int, dict[str, float]] = {}
    for layer in layers:
        first, second = samples[layer]
        gap = _gap_within(units[layer], first, second)
        several = units[layer].ndim > 1
        # What is learned or has several keeps its side; one estimate is on that of the refused.
        vectors[layer] = gap.norm() * units[layer] if several or learn else gap
        if not figured:
            continue
        # How good the estimate is, where it was made.
        figures[layer] = dict(figures_of(chosen.layer if chosen else layer))
        basis = vectors[layer].float() if several else None
        moved = (gap if several else vectors[layer]).float()
        if cosmic:
            figures[layer]["cosmic"] = cosmic.score(layer, moved, basis)
        if first_token:
            figures[layer] |= first_token.figures(layer, moved, basis)
    if not figured:
        return Directions(vectors, _origin(recipe))
    readings: dict[int, dict[str, tuple[int, ...]]] = {}
    for layer in dict.fromkeys([chosen.layer] if chosen else layers):
        if unseen := readings_of(layer):
            direction = chosen.direction if chosen else units[layer]
            gap = _gap_within(direction, *samples[layer])
            readings[layer] = _histograms(recipe.fit, found, layer, unseen, gap)
    return Directions(vectors, _origin(recipe), figures, readings)


def _histograms(
    choice: Fit, found: Activations, layer: int, unseen: tuple[Tensor, Tensor], gap: Tensor
) -> dict[str, tuple[int, ...]]:
    """Where the prompts of every role that was measured lie along a layer's direction.

    Of the two classes these are the prompts that behave as their class does, and the readings
    held out; of the other roles all prompts, along the direction of the two.
    """
    origin = found[choice.contrast][layer].samples.mean
    classes = dict(zip((choice.refused, choice.contrast), unseen, strict=True))
    return {
        role: counted(
            classes[role][observed[layer].weights > 0]
            if role in classes
            else read(observed[layer].values, origin, gap)
        )
        for role, observed in found.items()
        if layer in observed and len(observed[layer].values)
    }


def _directions(
    learned: Callable[[], Tensor] | None,
    choice: Fit,
    protect: Protect,
    refused: Samples,
    answered: Samples,
) -> Tensor:
    """The protected direction [d] of length 1, or several [k, d]; zeros where nothing is left."""
    found = learned() if learned else ESTIMATORS[choice.estimator](refused, answered, choice)
    rows = torch.stack([protect(one, answered) for one in rows_of(found)])
    lengths = rows.norm(dim=1, keepdim=True)
    kept = independent((rows / lengths)[lengths[:, 0] > NOTHING_LEFT])
    if not len(kept):
        return torch.zeros_like(rows[0])
    return kept if len(kept) > 1 else kept[0]


def _gap_within(directions: Tensor, refused: Samples, answered: Samples) -> Tensor:
    """The part [d] of the gap between the classes that lies along a direction, or in a span."""
    return within(directions, refused.mean - answered.mean)


def _reading(estimate: Estimate, refused: Samples, answered: Samples) -> Tensor:
    """What a prompt is projected on to be read: of several directions the gap within their span."""
    found = estimate(refused, answered)
    return found if found.ndim == 1 else _gap_within(found, refused, answered)


def _checked(
    choice: Fit, estimate: Estimate, samples: tuple[Samples, Samples], layer: int
) -> Tensor:
    first, second = samples
    names = f"layer {layer}: {choice.refused} and {choice.contrast}"
    if torch.equal(first.mean, second.mean):
        raise FitError(
            f"{names} have the same mean, so there is no direction between them; "
            "give other prompts or another layer"
        )
    direction = estimate(first, second)
    if not direction.any():
        raise FitError(
            f"{names}: nothing is left of the direction under fit.protect: {choice.protect}; "
            "protect less (protect_strength, protect_ridge, protect_share) or give another layer"
        )
    return direction


def _protection(choice: Fit, found: Activations, concepts: Activations, layer: int) -> Protect:
    """What `fit.protect` does to a direction, given the answered class that it is against."""
    if choice.protect == "none":
        return lambda direction, _: direction
    if choice.protect == "null-space":
        kept = [found[role][layer].everything for role in ("protected", "general")]
        axes = busiest(torch.cat(kept).to(torch.float64), choice.protect_share)
        return lambda direction, _: in_null_space(direction, axes)
    protected = found["protected"][layer].samples.mean
    if choice.protect == "remove":
        return lambda direction, answered: without(
            direction, protected - answered.mean, choice.protect_strength
        )
    means = [protected, *(concepts[name][layer].samples.mean for name in choice.concepts)]
    return lambda direction, answered: without_concepts(
        direction, torch.stack([mean - answered.mean for mean in means], 1), choice.protect_ridge
    )


@dataclass(frozen=True)
class _Chosen:
    layer: int
    direction: Tensor


def _chosen_by_cosmic(
    choice: Fit,
    estimates: Mapping[int, Estimate],
    samples: Mapping[int, tuple[Samples, Samples]],
    cosmic: CosmicScores,
    first_token: FirstToken,
) -> _Chosen:
    """The layer of the best score whose direction, taken out, leaves answered prompts alone."""
    candidates = []
    for layer in sorted(samples):
        if layer >= DEPTH * len(samples):
            continue
        direction = _checked(choice, estimates[layer], samples[layer], layer)
        first, second = samples[layer]
        gap = direction @ (first.mean - second.mean) * direction
        candidates.append((-cosmic.score(layer, gap.float()), layer, direction))
    for _, layer, direction in sorted(candidates, key=lambda one: one[:2]):
        if first_token.divergence(direction.float()) <= DIVERGENCE:
            return _Chosen(layer, direction)
    raise FitError(
        f"fit.estimator: cosmic: without any layer's direction the {choice.contrast} prompts are "
        f"answered otherwise (KL above {DIVERGENCE:g} at the last token); take another estimator"
    )


def _origin(recipe: Recipe) -> Origin:
    """What a file of the estimated directions says of them."""
    choice = recipe.fit
    apart = {
        "none": "",
        "remove": ", without the protected direction",
        "residual": ", without what protected concepts explain",
        "null-space": ", where protected and general activations are small",
    }[choice.protect]
    classes = f"{choice.refused} refused against {choice.contrast} answered{apart}"
    return Origin(recipe.model, choice.estimator, choice.site, f"recipe {recipe.name}: {classes}")
