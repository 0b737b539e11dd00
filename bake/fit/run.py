"""The fit: from a live model and labelled prompts to interventions.

One pass measures every class: means at the last prompt token after every block
that needs a direction, Gram matrices of the gated writers' inputs at the tokens
where a gate decides.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bake.activations import Conversation, Moments, Tap, collect
from bake.arch import Arch
from bake.checkpoint import Checkpoint
from bake.directions import Directions
from bake.edits import Step
from bake.errors import FitError
from bake.fit.constant import Constant, own_text, with_constants
from bake.fit.conversations import Conversations, conversations_of, passages, wanted_of
from bake.fit.estimate import roles_of_direction, roles_shown
from bake.fit.evidence import Evidence, bare, directions_of
from bake.fit.given import GivenProbes, given_probes
from bake.fit.kept import mean_key, opening_key, probe_key, ramp_key, readout_key
from bake.fit.labels import ClassRecord, Labelled, labelled, recorded
from bake.fit.onward import Onward
from bake.fit.ordered import fit_in_order
from bake.fit.place import Place, place_of
from bake.fit.protect import still, unread
from bake.fit.ramp import gate_readings, ramps_of, shown_classes
from bake.fit.readout import ReadoutClass, ridge_readout
from bake.fit.stream import stream_taps, watching_taps
from bake.hooks import Intervention
from bake.judge import Judge
from bake.model import LiveModel
from bake.ops import OPERATORS, Measured
from bake.ops.add import Add
from bake.ops.gate import Gate as RankOne
from bake.ops.gate import GateOperator
from bake.plan import Plan, direction_layers
from bake.prompts import Prompt, Splits
from bake.recipe import Decision, Gate, Recipe

__all__ = [
    "ClassRecord",
    "Fitted",
    "built",
    "check_class",
    "fit",
    "fit_directions",
    "needs_prompts",
    "ordered_gates",
    "probed",
    "probed_apart",
    "probes",
]

# Fits the ordered gates of an edit, by its number, with what is in force before it.
InOrder: TypeAlias = Callable[[int, Gate, Step, Sequence[Intervention]], None]

MINIMUM = 8
# The variants of an ablation that read the answered class's mean.
READ_MEANS = frozenset({"projected", "affine"})


@dataclass(frozen=True)
class Fitted:
    """The interventions in the plan's order, the directions used, and the figures of the fit.

    `openings` is what each probe reads on average in every class, by `opening_key`: ideal is 1 on
    the target and 0 elsewhere, but for protected prompts that a gate steers too; of a block gate,
    by the block in front, it is what it opens, of topics left out. `constants` is how near those
    of ridge carriers and of block gates are to 1; `kept` what else the interventions were
    built from, as `bake.fit.kept` has it.
    """

    interventions: tuple[Intervention, ...]
    directions: Directions
    classes: Mapping[str, ClassRecord]
    openings: Mapping[str, Mapping[str, float]]
    constants: Mapping[str, Constant]
    kept: Mapping[str, Tensor]


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
    concepts: Mapping[str, Sequence[Prompt]] | None = None,
) -> Fitted:
    """Fit every edit of the recipe on the prompts of each role, and on general text.

    `directions` stand in for estimated ones: then no class has to behave in any way, and
    where `needs_prompts` says so no prompt is shown to the model at all. `progress`
    receives the number of prompts done since the last call; each prompt is done twice,
    answered and measured, each text and each prompt of the sets in `concepts` once.
    Raises FitError when a class has too few prompts that behave as the direction needs them.
    """
    labels: dict[str, list[Labelled]] = {}
    given = given_probes(recipe, plan)
    if needs_prompts(plan, recipe, directions, given):
        labels = _labels(model, recipe, prompts, judge, progress, directions is None)
    texts_shown = texts.fit[: recipe.fit.prompts_per_class]
    shown = Conversations(model, recipe, labels, texts_shown, progress)
    own = recipe.fit.positions.decision()
    conversations = shown.at(own)
    layers = direction_layers(recipe)
    depth = model.arch.layer_count(base.config)
    seen = _candidates(recipe, layers, depth) if directions is None else ()
    place = _place(model, base, recipe, seen)
    apart = probed_apart(plan, recipe)
    moments: dict[Decision, dict[str, dict[Any, Moments]]] = {}
    begun = {role: Onward(model) for role in shown.weighed(own)}
    first = _first_ordered(recipe) if seen else None
    # Where the fit looks the stream is read too, whatever gates decide there.
    for places in dict.fromkeys((own, *apart)):
        read = probes(model, plan, apart.get(places, ()))
        moments[places] = {}
        for role, found in shown.weighed(places).items():
            taps, run = dict(read), None
            if places == own:
                taps |= _stream(place, base, recipe, seen, role, found)
                if read and role in labels and role not in roles_shown(recipe.fit):
                    taps |= watching_taps(place, seen, len(found))
                run = begun[role].to(first) if first is not None and taps else None
            if taps:
                moments[places][role] = collect(model, found, taps, progress=progress, run=run)
            else:
                progress(len(found))
    openings: dict[str, dict[str, float]] = {}
    kept = {key: tensor for one in given.values() for key, tensor in one.kept.items()}
    errors: dict[str, Constant] = {}

    def in_order(number: int, spec: Gate, step: Step, in_force: Sequence[Intervention]) -> None:
        gates = ordered_gates(spec, step, measured(number), model.arch)
        taps = probes(model, plan, [gate.module for _, gate in gates])
        found = fit_in_order(
            *(model, gates, taps, shown.weighed(recipe.decides(spec))),
            *(spec.heights, spec.ridge, in_force, progress),
            begun={} if in_force else begun,
            null_space=spec.null_space,
        )
        for module, one in found.items():
            openings[opening_key(number, module)] = dict(one.openings)
            kept[probe_key(number, module)] = one.probe.float()

    def probe(number: int, module: str, spec: Gate) -> Tensor:
        key = probe_key(number, module)
        if not spec.ordered and spec.probes is None:
            by_role = moments[recipe.decides(spec)]
            found = _readout(by_role, module, spec)
            kept[key] = found.float()
            openings[opening_key(number, module)] = {
                role: float(found @ by_tap[module].mean) for role, by_tap in by_role.items()
            }
        return kept[key]

    means: dict[int, Tensor] = {}
    if directions is None:
        sets = bare(place, concepts or {}, seen, progress)
        evidence = Evidence(model, depth, place, labels, conversations, moments[own], sets)
        directions = directions_of(recipe, evidence, layers)
        means = {layer: moments[own][recipe.fit.contrast][layer].mean.float() for layer in layers}
    used = directions.at(layers)
    for number, gate in enumerate(recipe.edits):
        of_file = given.get(number, GivenProbes())
        if not (isinstance(gate, Gate) and gate.form == "block") or of_file.kept:
            continue
        classes = shown_classes(shown.at(recipe.decides(gate)), labels)
        reading = gate_readings(
            *(model, base, gate, used.vectors, classes, progress), given=of_file.conditions
        )
        for layer, behind in reading.items():
            name = model.arch.layer.format(layer=layer)
            kept[ramp_key(number, layer)], opened = ramps_of(gate, behind)
            openings[opening_key(number, name)], errors[name] = opened, behind.error

    def ramps(number: int, layer: int, spec: Gate) -> Tensor:
        return kept[ramp_key(number, layer)]

    def measured(number: int) -> Measured:
        found = partial(probe, number), base, means, partial(ramps, number)
        return Measured(used.vectors, *found)

    numbered = built(recipe, plan, measured, model.arch, in_order)
    edits = [(recipe.edits[number], one) for number, one in numbered]
    ridge = any(edit.carrier == "ridge" for edit in plan.edits)
    chats = [one for role, found in conversations.items() for one in found if role != "text"]
    general = [chats, conversations["text"], own_text(model)] if ridge else []
    interventions, constants = with_constants(model, edits, general, passages(model, texts.test))
    for (number, _), one in zip(numbered, interventions, strict=True):
        if isinstance(one, Add) and one.readout is not None:
            kept[readout_key(number)] = one.readout
    if any(spec.op == "ablate" and READ_MEANS & set(spec.variant) for spec in recipe.edits):
        kept |= {mean_key(layer): mean for layer, mean in means.items()}
    records = {role: recorded(one) for role, one in labels.items()}
    return Fitted(interventions, used, records, openings, {**errors, **constants}, kept)


def fit_directions(
    model: LiveModel,
    base: Checkpoint,
    recipe: Recipe,
    layers: Sequence[int],
    prompts: Mapping[str, Sequence[Prompt]],
    judge: Judge,
    concepts: Mapping[str, Sequence[Prompt]],
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[Directions, Mapping[str, ClassRecord]]:
    """The direction of each of some layers with all of its figures, and nothing else.

    `prompts` need only be of the roles that `roles_shown` names. Raises FitError as `fit`.
    """
    labels = labels_of_direction(model, recipe, prompts, judge, progress)
    directions = measured_directions(model, base, recipe, layers, labels, concepts, progress)
    return directions, {role: recorded(one) for role, one in labels.items()}


def labels_of_direction(
    model: LiveModel,
    recipe: Recipe,
    prompts: Mapping[str, Sequence[Prompt]],
    judge: Judge,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, list[Labelled]]:
    """The labels of every role's prompts; raises FitError as `fit`."""
    return _labels(model, recipe, prompts, judge, progress, True)


def measured_directions(
    model: LiveModel,
    base: Checkpoint,
    recipe: Recipe,
    layers: Sequence[int],
    labels: Mapping[str, Sequence[Labelled]],
    concepts: Mapping[str, Sequence[Prompt]],
    progress: Callable[[int], None] = lambda _: None,
) -> Directions:
    """As `fit_directions`, of prompts that have their labels."""
    conversations = {role: conversations_of(recipe, role, one) for role, one in labels.items()}
    depth = model.arch.layer_count(base.config)
    seen = _candidates(recipe, layers, depth)
    place = _place(model, base, recipe, seen)
    moments = {}
    for role, found in conversations.items():
        taps = _stream(place, base, recipe, seen, role, found)
        moments[role] = collect(model, found, taps, progress=progress, state="bare")
    sets = bare(place, concepts, seen, progress)
    evidence = Evidence(model, depth, place, labels, conversations, moments, sets)
    return directions_of(recipe, evidence, layers, scored=True)


def needs_prompts(
    plan: Plan,
    recipe: Recipe,
    directions: Directions | None,
    given: Mapping[int, GivenProbes] = MappingProxyType({}),
) -> bool:
    """Whether the fit shows prompts to the model: for directions, a gate's probe, a constant."""
    complete = {number for number, one in given.items() if one.kept}
    return (
        directions is None
        or any(edit.carrier == "ridge" for edit in plan.edits)
        or any(
            isinstance(spec, Gate) and number not in complete
            for number, spec in enumerate(recipe.edits)
        )
    )


def built(
    recipe: Recipe,
    plan: Plan,
    measured: Callable[[int], Measured],
    arch: Arch,
    in_order: InOrder,
) -> list[tuple[int, Intervention]]:
    """Every intervention of the plan, in its order, with the number of the edit it comes from.

    `measured` has what is known of an edit, by its number: two that are equal are two. `in_order`
    fits the probes of an edit's ordered gates, with the interventions before it.
    """
    found: list[tuple[int, Intervention]] = []
    for number, (spec, step) in enumerate(zip(recipe.edits, plan.steps, strict=True)):
        if isinstance(spec, Gate) and spec.ordered:
            in_order(number, spec, step, [one for _, one in found])
        interventions = OPERATORS[spec.op].build(spec, step, measured(number), arch)
        found += [(number, one) for one in interventions]
    return found


def ordered_gates(
    spec: Gate, step: Step, measured: Measured, arch: Arch
) -> list[tuple[int, RankOne]]:
    """The gates of an edit with their layers, as tokens pass them, before they have probes."""
    blank = replace(measured, probe=lambda *_: torch.zeros(0))
    planned = GateOperator().build(spec, step, blank, arch)
    gates = [one for one in planned if isinstance(one, RankOne)]
    written = arch.written(edit.tensor for edit in step.edits)
    layers = [one.layer for writers in written.values() for one in writers]
    return list(zip(layers, gates, strict=True))


def probed(plan: Plan, recipe: Recipe) -> set[str]:
    """The modules on whose inputs a probe is fitted."""
    return {
        module
        for spec, step in zip(recipe.edits, plan.steps, strict=True)
        for module in OPERATORS[spec.op].probed(step)
    }


def probed_apart(plan: Plan, recipe: Recipe) -> dict[Decision, set[str]]:
    """Those whose probes are fitted, each by itself on the base model, by where gates decide."""
    found: dict[Decision, set[str]] = {}
    for spec, step in zip(recipe.edits, plan.steps, strict=True):
        modules = OPERATORS[spec.op].probed(step)
        if modules and isinstance(spec, Gate) and not spec.ordered and spec.probes is None:
            found.setdefault(recipe.decides(spec), set()).update(modules)
    return found


def _labels(
    model: LiveModel,
    recipe: Recipe,
    prompts: Mapping[str, Sequence[Prompt]],
    judge: Judge,
    progress: Callable[[int], None],
    for_direction: bool,
) -> dict[str, list[Labelled]]:
    """Label every role's prompts.

    Raises FitError where they shall make a direction and too few behave as it needs.
    """
    found = {}
    for role, chosen in prompts.items():
        found[role] = labelled(model, recipe, chosen, judge, progress)
        if for_direction:
            check_class(recipe, role, found[role])
    return found


def check_class(recipe: Recipe, role: str, labels: Sequence[Labelled]) -> None:
    """Raise FitError where a role makes the direction and too few prompts behave as it needs."""
    usable = sum(one.side == wanted_of(recipe, role) for one in labels)
    if usable >= MINIMUM or role not in roles_of_direction(recipe.fit):
        return
    behaviour = "refused" if wanted_of(recipe, role) > 0 else "answered"
    neutral = sum(one.side == 0 for one in labels)
    neither = f" ({neutral} were neither)" if neutral else ""
    raise FitError(
        f"prompts.{role}: only {usable} of {len(labels)} fitting prompts were "
        f"{behaviour} by the base model{neither}, at least {MINIMUM} are needed; "
        "give more or other prompts"
    )


def probes(model: LiveModel, plan: Plan, modules: Iterable[str]) -> dict[Any, Tap]:
    """The inputs of some of the plan's modules, as probes read them.

    In front of a post-norm a probe reads in units of what the norm divides by.
    """
    taps: dict[Any, Tap] = {}
    norms = {
        one.module: model.arch.post_norm(one.layer, one.branch)
        for written in model.arch.written(edit.tensor for edit in plan.edits).values()
        for one in written
    }
    for module in modules:
        norm = norms[module]
        behind = model.module(norm.module) if norm else None
        taps[module] = Tap(model.module(module), "input", "decision", "second", behind)
    return taps


def _place(model: LiveModel, base: Checkpoint, recipe: Recipe, layers: Sequence[int]) -> Place:
    """Where the recipe has directions measured."""
    return place_of(model, base, layers, recipe.fit.site, recipe.fit.positions.direction)


def _stream(
    place: Place,
    base: Checkpoint,
    recipe: Recipe,
    layers: Sequence[int],
    role: str,
    conversations: Sequence[Conversation],
) -> dict[Any, Tap]:
    """The stream at a place in `layers`, where the direction is made of the role."""
    if role not in roles_shown(recipe.fit):
        return {}
    width = place.model.arch.width(base.config)
    return stream_taps(place, layers, recipe.fit, role, conversations, width)


def _candidates(recipe: Recipe, layers: Sequence[int], depth: int) -> Sequence[int]:
    """The layers whose stream is read: all of them where COSMIC chooses one."""
    if recipe.fit.estimator == "cosmic":
        return range(depth)
    chosen = set() if recipe.fit.layer is None else {recipe.fit.layer}
    return sorted(chosen.union(layers))


def _first_ordered(recipe: Recipe) -> int | None:
    """The block in which the first edit's ordered gates begin; nothing in front is steered.

    None where they decide at positions of their own, since their passes are others.
    """
    edit = recipe.edits[0]
    if not (isinstance(edit, Gate) and edit.ordered):
        return None
    return min(edit.layers) if recipe.decides(edit) == recipe.fit.positions.decision() else None


def _readout(moments: Mapping[str, Mapping[Any, Moments]], module: str, spec: Gate) -> Tensor:
    """The probe that reads the gate's `heights` on every class's decision tokens."""
    values = spec.heights
    classes = [
        ReadoutClass(by_tap[module].mean, by_tap[module].gram, values.get(role, 0.0))
        for role, by_tap in moments.items()
    ]
    if spec.null_space is None:
        return ridge_readout(classes, spec.ridge)
    grams = {role: by_tap[module].gram for role, by_tap in moments.items()}
    return ridge_readout(classes, spec.ridge, unread(still(grams), spec.null_space))
