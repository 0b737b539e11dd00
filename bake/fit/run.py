"""The fit: from a live model and labelled prompts to interventions.

One pass measures every class: means at the last prompt token after every block
that needs a direction, Gram matrices of the gated writers' inputs at the tokens
where a gate decides.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from bake.activations import Conversation, Moments, Tap, collect
from bake.checkpoint import Checkpoint
from bake.directions import Directions
from bake.directions.value import Origin
from bake.errors import FitError
from bake.fit.constant import Constant, own_text, with_constants
from bake.fit.mean_difference import mean_difference
from bake.fit.protect import without
from bake.fit.readout import ReadoutClass, ridge_readout
from bake.fit.rmd import rmd, rmd_dual
from bake.fit.wrmd import confidence_weight
from bake.hooks import Intervention
from bake.judge import Judge
from bake.model import LiveModel
from bake.ops import OPERATORS, Measured
from bake.plan import Plan, direction_layers
from bake.prompts import Prompt, Splits
from bake.recipe import Recipe

__all__ = ["ClassRecord", "Fitted", "fit", "needs_prompts"]

MINIMUM = 8
LABEL_TOKENS = 16
PASSAGE_TOKENS = 96


@dataclass(frozen=True)
class ClassRecord:
    """How the base model behaves on a class's fitting prompts."""

    prompts: int
    refused: int


@dataclass(frozen=True)
class Fitted:
    """The interventions in the plan's order, the directions used, and the figures of the fit.

    `openings` is what each module's probe reads on average in every class: 1 on the
    target and 0 elsewhere is ideal; `constants` how near the ridge carriers' constants
    are to 1.
    """

    interventions: tuple[Intervention, ...]
    directions: Directions
    classes: Mapping[str, ClassRecord]
    openings: Mapping[str, Mapping[str, float]]
    constants: Mapping[str, Constant]


def fit(
    model: LiveModel,
    base: Checkpoint,
    plan: Plan,
    recipe: Recipe,
    prompts: Mapping[str, Sequence[Prompt]],
    texts: Splits,
    judge: Judge,
    progress: Callable[[int], None] = lambda _: None,
    directions: Directions | None = None,
) -> Fitted:
    """Fit every edit of the recipe on the prompts of each role, and on general text.

    `directions` stand in for estimated ones: then no class has to behave in any way, and
    where `needs_prompts` says so no prompt is shown to the model at all. `progress`
    receives the number of prompts done since the last call; each prompt is done twice,
    answered and measured, each text once. Raises FitError when a class has too few prompts
    that behave as the direction needs them.
    """
    conversations: dict[str, list[Conversation]] = {}
    records: dict[str, ClassRecord] = {}
    if needs_prompts(plan, recipe, directions):
        enough = _of_direction(recipe) if directions is None else set()
        for role, chosen in prompts.items():
            conversations[role], records[role] = _conversations(
                model, recipe, role, chosen, judge, progress, role in enough
            )
        texts_shown = texts.fit[: recipe.fit.prompts_per_class]
        conversations["text"] = _passages(model, texts_shown)
    layers = direction_layers(recipe)
    taps = _taps(model, recipe, plan, conversations, layers if directions is None else ())
    moments = {
        role: collect(model, found, taps, progress=progress)
        for role, found in conversations.items()
        if taps
    }
    openings: dict[str, dict[str, float]] = {}

    def probe(module: str, ridge: float) -> Tensor:
        found = _readout(moments, module, ridge)
        openings[module] = {
            role: float(found @ by_tap[module].mean) for role, by_tap in moments.items()
        }
        return found

    means: dict[int, Tensor] = {}
    if directions is None:
        estimated = {layer: _direction(recipe, moments, layer) for layer in layers}
        means = {layer: moments[recipe.fit.contrast][layer].mean.float() for layer in layers}
        directions = Directions(estimated, _origin(recipe))
    used = directions.at(layers)
    measured = Measured(used.vectors, probe, base, means)
    built = [
        (spec, one)
        for spec, step in zip(recipe.edits, plan.steps, strict=True)
        for one in OPERATORS[spec.op].build(spec, step, measured, model.arch)
    ]
    ridge = any(edit.carrier == "ridge" for edit in plan.edits)
    chats = [one for role, found in conversations.items() for one in found if role != "text"]
    classes = [chats, conversations["text"], own_text(model)] if ridge else []
    interventions, constants = with_constants(model, built, classes, _passages(model, texts.test))
    return Fitted(interventions, used, records, openings, constants)


def needs_prompts(plan: Plan, recipe: Recipe, directions: Directions | None) -> bool:
    """Whether the fit shows prompts to the model: for directions, a gate's probe, a constant."""
    return (
        directions is None
        or any(edit.carrier == "ridge" for edit in plan.edits)
        or bool(_probed(plan, recipe))
    )


def _probed(plan: Plan, recipe: Recipe) -> set[str]:
    """The modules on whose inputs a probe is fitted."""
    return {
        module
        for spec, step in zip(recipe.edits, plan.steps, strict=True)
        for module in OPERATORS[spec.op].probed(step)
    }


def _conversations(
    model: LiveModel,
    recipe: Recipe,
    role: str,
    prompts: Sequence[Prompt],
    judge: Judge,
    progress: Callable[[int], None],
    of_direction: bool,
) -> tuple[list[Conversation], ClassRecord]:
    """Answer the prompts, label the answers, and mark the positions that count.

    Raises FitError for a class `of_direction`, which makes one, when too few of its prompts
    behave as it needs.
    """
    refuses_as_it_should = role in (recipe.fit.refused, "protected")
    tail, answer_tokens = recipe.fit.positions.template, recipe.fit.positions.answer
    starts = [model.render(prompt.text) for prompt in prompts]
    answers = model.answer(starts, max(LABEL_TOKENS, answer_tokens), progress=progress)
    found, refused = [], 0
    for prompt, start, answer in zip(prompts, starts, answers, strict=True):
        refuses = judge.refuses(prompt.text, model.text(answer))
        refused += refuses
        weight = 0.0
        if refuses == refuses_as_it_should:
            # One greedy answer is a confidence of 1 or -1.
            weighted = recipe.fit.estimator == "wrmd"
            weight = confidence_weight(1.0 if refuses else -1.0, refuses) if weighted else 1.0
        ids = (*start, *answer[:answer_tokens])
        first = max(0, len(start) - tail)
        found.append(Conversation(ids, len(start) - 1, tuple(range(first, len(ids))), weight))
    usable = sum(one.weight > 0 for one in found)
    if usable < MINIMUM and of_direction:
        behaviour = "refused" if refuses_as_it_should else "answered"
        raise FitError(
            f"prompts.{role}: only {usable} of {len(found)} fitting prompts were {behaviour} "
            f"by the base model, at least {MINIMUM} are needed; give more or other prompts"
        )
    return found, ClassRecord(len(found), refused)


def _of_direction(recipe: Recipe) -> set[str]:
    """The roles whose means make the direction."""
    roles: set[str] = {recipe.fit.refused, recipe.fit.contrast}
    return roles | {"protected"} if recipe.fit.protect == "remove" else roles


def _passages(model: LiveModel, texts: Sequence[Prompt]) -> list[Conversation]:
    """General text without a template: every token counts, for the gates alone."""
    found = []
    for text in texts:
        ids = model.tokenizer(text.text, add_special_tokens=False).input_ids[:PASSAGE_TOKENS]
        found.append(Conversation(tuple(ids), len(ids) - 1, tuple(range(len(ids))), 0.0))
    return found


def _taps(
    model: LiveModel,
    recipe: Recipe,
    plan: Plan,
    conversations: Mapping[str, Sequence[Conversation]],
    layers: Iterable[int],
) -> dict[Any, Tap]:
    """What to measure: the stream behind `layers`, and the inputs that probes read.

    With fewer samples than dimensions ridge estimators keep them for their dual form. In
    front of a post-norm a probe reads in units of what the norm divides by.
    """
    taps: dict[Any, Tap] = {}
    for layer in layers:
        few = len(conversations[recipe.fit.contrast]) < plan.width
        ridge: Literal["samples", "second"] = "samples" if few else "second"
        keep = "mean" if recipe.fit.estimator == "mean-difference" else ridge
        taps[layer] = Tap(model.block(layer), "output", "last", keep)
    norms = {
        one.module: model.arch.post_norm(one.layer, one.branch)
        for written in model.arch.written(edit.tensor for edit in plan.edits).values()
        for one in written
    }
    for module in _probed(plan, recipe):
        norm = norms[module]
        behind = model.module(norm.module) if norm else None
        taps[module] = Tap(model.module(module), "input", "decision", "second", behind)
    return taps


def _origin(recipe: Recipe) -> Origin:
    """What a file of the estimated directions says of them."""
    choice = recipe.fit
    apart = ", without the protected direction" if choice.protect == "remove" else ""
    classes = f"{choice.refused} refused against {choice.contrast} answered{apart}"
    return Origin(recipe.model, choice.estimator, "out", f"recipe {recipe.name}: {classes}")


def _direction(recipe: Recipe, moments: Mapping[str, Mapping[Any, Moments]], layer: int) -> Tensor:
    """The refusal direction after a block, scaled to the gap between the two classes.

    A strength of 1 therefore moves the answered class's mean to the refused one's,
    measured along the direction.
    """
    choice = recipe.fit
    refused, answered = moments[choice.refused][layer], moments[choice.contrast][layer]
    difference = mean_difference(refused.mean, answered.mean)
    if choice.estimator == "mean-difference":
        direction = difference
    elif answered.keep == "samples":
        direction = rmd_dual(refused.mean, answered.mean, answered.centred, choice.ridge)
    else:
        direction = rmd(refused.mean, answered.mean, answered.covariance, choice.ridge)
    if choice.protect == "remove":
        protected = mean_difference(moments["protected"][layer].mean, answered.mean)
        direction = without(direction, protected)
    if not direction.norm() > 0:
        raise FitError(
            f"layer {layer}: {choice.refused} and {choice.contrast} have the same mean, so there "
            "is no direction between them; give other prompts or another layer"
        )
    unit = direction / direction.norm()
    gap: Tensor = (unit @ difference) * unit
    return gap


def _readout(moments: Mapping[str, Mapping[Any, Moments]], module: str, ridge: float) -> Tensor:
    """The probe that reads 1 on the target's decision tokens and 0 on every other class's."""
    classes = [
        ReadoutClass(by_tap[module].mean, by_tap[module].gram, float(role == "target"))
        for role, by_tap in moments.items()
    ]
    return ridge_readout(classes, ridge)
