"""What the prompts of every role show of a live model, and the directions that follow from it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bake.activations import Conversation, Moments, collect
from bake.directions import Directions
from bake.fit.cosmic import CosmicScores
from bake.fit.estimate import Activations, estimated
from bake.fit.first_token import FirstToken
from bake.fit.labels import Labelled
from bake.fit.learned import LEARNED, Lesson, Said, refusal_openings
from bake.fit.place import Place
from bake.fit.scores import Observed
from bake.fit.spread import Draw
from bake.fit.stream import observed
from bake.model import LiveModel
from bake.progress import progress
from bake.prompts import Prompt
from bake.recipe import Fit, Recipe

__all__ = ["Evidence", "bare", "directions_of"]


@dataclass(frozen=True, eq=False)
class Evidence:
    """By role the labels of its prompts, their conversations, and what these left at a place.

    `sets` are the activations of prompt sets without a role, by name (`bare`); the model has
    `depth` blocks.
    """

    model: LiveModel
    depth: int
    place: Place
    labels: Mapping[str, Sequence[Labelled]]
    conversations: Mapping[str, Sequence[Conversation]]
    moments: Mapping[str, Mapping[Any, Moments]]
    sets: Activations


def bare(
    place: Place,
    sets: Mapping[str, Sequence[Prompt]],
    layers: Sequence[int],
    progress: Callable[[int], None] = lambda _: None,
    *,
    samples: bool = False,
) -> dict[str, dict[int, Observed]]:
    """What prompt sets leave at a place in some blocks; nobody asks how they are answered.

    Their means, or with `samples` every activation.
    """
    found, model = {}, place.model
    for name, prompts in sets.items():
        starts = [tuple(model.render(prompt.text)) for prompt in prompts]
        conversations = [Conversation(ids, len(ids) - 1, ()) for ids in starts]
        labels = [Labelled(prompt, (), (), 0.0, ()) for prompt in prompts]
        rows = tuple(range(len(prompts))) if samples else ()
        taps = {layer: place.tap(layer, rows=rows) for layer in layers}
        measured = collect(model, conversations, taps, progress=progress, state="bare")
        found[name] = {layer: observed(measured, layer, conversations, labels) for layer in layers}
    return found


def directions_of(
    recipe: Recipe,
    evidence: Evidence,
    layers: Sequence[int],
    scored: bool = False,
    figured: bool = True,
) -> Directions:
    """The directions of some layers with their figures, or without where not `figured`.

    Where `scored` those too that take passes of their own.
    """
    conversations, choice = evidence.conversations, recipe.fit
    seen = [layer for layer in evidence.moments[choice.refused] if isinstance(layer, int)]
    found = {
        role: {
            layer: observed(evidence.moments[role], layer, conversations[role], labels)
            for layer in seen
        }
        for role, labels in evidence.labels.items()
        if seen[0] in evidence.moments.get(role, ())
    }
    cosmic = first_token = learn = None
    if scored or choice.estimator == "cosmic":
        classes = conversations[choice.refused], conversations[choice.contrast]
        cosmic = CosmicScores(evidence.model, *classes, evidence.depth, evidence.place)
        openings = refusal_openings(*_said(evidence, choice))
        first_token = FirstToken(evidence.model, *classes, evidence.depth, openings, evidence.place)
    if choice.estimator in LEARNED:
        learn = partial(_learned, evidence, _lesson(recipe, evidence, found, seen))
    return estimated(recipe, found, evidence.sets, layers, cosmic, first_token, learn, figured)


def _learned(
    evidence: Evidence, lesson: Lesson, layer: int, drawn: tuple[Draw, Draw] | None = None
) -> Tensor:
    choice = lesson.choice
    label = f"{choice.estimator}, layer {layer}"
    if drawn:
        label, lesson = f"{label}, drawn again", lesson.again(*drawn)
    with progress(label, choice.steps, evidence.model.work.main) as update:
        return LEARNED[choice.estimator](lesson, layer, update)


def _said(evidence: Evidence, choice: Fit) -> tuple[Sequence[Said], Sequence[Said]]:
    """The refused class and the other one: prompts that behave as it does, with answers."""

    def of(role: str) -> list[Said]:
        pairs = zip(evidence.labels[role], evidence.conversations[role], strict=True)
        return [
            Said(label.start, label.answer, label.prompt.topic)
            for label, one in pairs
            if one.weight > 0
        ]

    return of(choice.refused), of(choice.contrast)


def _lesson(
    recipe: Recipe, evidence: Evidence, classes: Activations, layers: Sequence[int]
) -> Lesson:
    """What an estimator learns from: the prompts that behave as their class does."""
    choice = recipe.fit

    def kinds(layer: int) -> Tensor:
        roles = dict.fromkeys((choice.refused, "protected"))
        found = [classes[role][layer] for role in roles if role in classes]
        found += [evidence.sets[name][layer] for name in choice.categories]
        return torch.stack([one.samples.mean for one in found])

    refused, answered = classes[choice.refused], classes[choice.contrast]
    said = _said(evidence, choice)
    return Lesson(
        *(evidence.model, evidence.depth, *said),
        samples={layer: (refused[layer].samples, answered[layer].samples) for layer in layers},
        kinds={layer: kinds(layer) for layer in layers},
        choice=choice,
        seed=recipe.seed,
    )
