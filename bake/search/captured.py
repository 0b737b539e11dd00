"""What the fitting prompts show of the base model, once for all trials of a search."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bake.activations import Conversation, Moments, Tap, collect
from bake.checkpoint import Checkpoint
from bake.directions import Directions
from bake.edits import Step
from bake.errors import BakeError, RecipeError
from bake.fit.conversations import Conversations, conversations_of
from bake.fit.evidence import Evidence, bare, directions_of
from bake.fit.given import given_probes
from bake.fit.kept import probe_key, ramp_key
from bake.fit.labels import Labelled
from bake.fit.ordered import fit_in_order
from bake.fit.place import Place, place_of
from bake.fit.protect import STILL, unread
from bake.fit.ramp import Reading, gate_readings, ramps_of, shown_classes
from bake.fit.readout import ridge_solutions
from bake.fit.run import (
    built,
    check_class,
    ordered_gates,
    probed_apart,
    probes,
)
from bake.hooks import Intervention
from bake.journal import hashed
from bake.model import LiveModel
from bake.ops import Measured
from bake.placement import free_memory
from bake.plan import Plan, direction_layers
from bake.progress import progress
from bake.prompts import Prompt, Splits
from bake.recipe import Decision, Gate, Recipe

__all__ = ["Captured", "asks_null_space", "check_memory"]

# Bytes an entry of a Gram matrix takes while it is summed: one class in float64, all in float32.
SUMMED = 12


@dataclass(eq=False)
class _Inputs:
    """Of a writer's inputs the sum of all classes' Gram matrices, and every class's mean.

    `still` is the sum over general prompts and text, where probes are in its null space.
    """

    gram: Tensor
    still: Tensor | None = None
    means: dict[str, Tensor] = field(default_factory=dict)
    solutions: dict[tuple[float, float | None], Tensor] = field(default_factory=dict)

    def probe(self, spec: Gate) -> Tensor:
        """The readout [d] of `ridge_readout`, put together from those of single classes."""
        key = spec.ridge, spec.null_space
        if key not in self.solutions:
            means, unseen = torch.stack(list(self.means.values())), None
            if spec.null_space is not None and self.still is not None:
                unseen = unread(self.still.double(), spec.null_space)
            self.solutions[key] = ridge_solutions(self.gram.double(), means, spec.ridge, unseen)
        values = [spec.heights.get(role, 0.0) for role in self.means]
        return torch.tensor(values, dtype=torch.float64) @ self.solutions[key]


class Captured:
    """The labels of every role's prompts and what they leave in the model.

    A fit of any trial follows from this without another pass: directions from the samples of
    every block at a site and token, probes from the moments of the gated writers' inputs. Each
    is measured when a trial first needs it, and then kept.
    """

    def __init__(
        self,
        model: LiveModel,
        base: Checkpoint,
        recipe: Recipe,
        labels: Mapping[str, Sequence[Labelled]],
        texts: Splits,
        concepts: Mapping[str, Sequence[Prompt]],
        directions: Directions | None = None,
    ) -> None:
        self._model, self._base, self._labels = model, base, labels
        self._concepts, self._given = concepts, directions
        self._depth = model.arch.layer_count(base.config)
        # Weights are a trial's own; what is read, and where, is the same in all of them.
        self._own = recipe.fit.positions.decision()
        texts_shown = texts.fit[: recipe.fit.prompts_per_class]
        self._chats = Conversations(model, recipe, labels, texts_shown)
        self._chats.weighed(self._own)
        self._shown = {role: self._chats.at(self._own)[role] for role in labels}
        self._inputs: dict[tuple[Decision, str], _Inputs] = {}
        self._readings: dict[str, dict[int, Reading]] = {}
        self._samples: dict[tuple[str, int], dict[str, dict[int, Tensor]]] = {}
        self._evidence: dict[str, Evidence] = {}
        self._vectors: dict[tuple[str, int], Tensor] = {}

    def interventions(self, recipe: Recipe, plan: Plan) -> tuple[Intervention, ...]:
        """What a bake of the recipe would put into the weights, as hooks.

        But for the constant of a ridge carrier, which no hook reads. Raises FitError as a fit.
        """
        layers = direction_layers(recipe)
        means: dict[int, Tensor] = {}
        if self._given is not None:
            vectors = dict(self._given.at(layers).vectors)
        else:
            vectors = self._directions(recipe, layers)
            contrast = self._evidence_of(recipe).moments[recipe.fit.contrast]
            means = {layer: contrast[layer].mean.float() for layer in layers}
        self.read_inputs([plan], [recipe])
        given = given_probes(recipe, plan)
        kept = {key: tensor for one in given.values() for key, tensor in one.kept.items()}

        found: dict[tuple[int, str], Tensor] = {}

        def in_order(number: int, spec: Gate, step: Step, in_force: Sequence[Intervention]) -> None:
            gates = ordered_gates(spec, step, measured(number), self._model.arch)
            taps = probes(self._model, plan, [gate.module for _, gate in gates])
            shown = self._chats.weighed(recipe.decides(spec))
            fitted = fit_in_order(
                *(self._model, gates, taps, shown, spec.heights, spec.ridge, in_force),
                null_space=spec.null_space,
            )
            found.update({(number, module): one.probe for module, one in fitted.items()})

        def probe(number: int, module: str, spec: Gate) -> Tensor:
            if spec.probes is not None:
                return kept[probe_key(number, module)]
            if spec.ordered:
                return found[number, module]
            return self._inputs[recipe.decides(spec), module].probe(spec)

        def ramps(number: int, layer: int, spec: Gate) -> Tensor:
            key = ramp_key(number, layer)
            if key in kept:
                return kept[key]
            conditions = given[number].conditions if number in given else {}
            places = recipe.decides(spec)
            return ramps_of(spec, self._readings_of(spec, places, vectors, conditions)[layer])[0]

        def measured(number: int) -> Measured:
            solved = partial(probe, number), self._base, means, partial(ramps, number)
            return Measured(vectors, *solved)

        return tuple(one for _, one in built(recipe, plan, measured, self._model.arch, in_order))

    def _readings_of(
        self,
        spec: Gate,
        places: Decision,
        vectors: Mapping[int, Tensor],
        given: Mapping[int, Tensor],
    ) -> dict[int, Reading]:
        """What a block gate's probes read, which its edges and its strength do not change."""
        unseen = [vectors[layer].tolist() for layer in spec.layers]
        read_at = places.model_dump(mode="json")
        key = hashed([spec.layers, list(spec.heights), spec.ridge, unseen, spec.probes, read_at])
        if key not in self._readings:
            classes = shown_classes(self._chats.at(places), self._labels)
            with progress("block gates", 2 * sum(map(len, classes.values()))) as update:
                self._readings[key] = gate_readings(
                    self._model, self._base, spec, vectors, classes, update, given
                )
        return self._readings[key]

    def read_inputs(self, plans: Sequence[Plan], recipes: Sequence[Recipe]) -> None:
        """Measure what the plans' probes read, where that is not known yet.

        In one pass a class for all gates that decide at the same positions. The first of them gives
        the samples of every place too where the recipes measure directions.
        """
        taps: dict[Decision, dict[Any, Tap]] = {}
        apart = any(asks_null_space(one) for one in recipes)
        for plan, recipe in zip(plans, recipes, strict=True):
            for places, modules in probed_apart(plan, recipe).items():
                known = {
                    module
                    for (where, module), one in self._inputs.items()
                    if where == places and not (apart and one.still is None)
                }
                missing = sorted(modules - known)
                taps.setdefault(places, {}).update(probes(self._model, plan, missing))
        for places, read in taps.items():
            if read:
                self._read_at(places, read, recipes, apart)

    def _read_at(
        self,
        positions: Decision,
        taps: Mapping[Any, Tap],
        recipes: Sequence[Recipe],
        apart: bool,
    ) -> None:
        """Measure some inputs where gates decide at some positions, of STILL `apart` too."""
        found: dict[str, _Inputs] = {}
        weighed = self._chats.weighed(positions)
        places = self._unseen(recipes)
        seen: dict[tuple[str, int], dict[str, dict[int, Tensor]]] = {key: {} for key in places}
        with progress("gates", sum(map(len, weighed.values()))) as update:
            for role, conversations in weighed.items():
                streams = {
                    (key, layer): tap
                    for key, place in places.items()
                    if role in self._shown
                    for layer, tap in self._stream(place, conversations).items()
                }
                both = collect(self._model, conversations, {**taps, **streams}, progress=update)
                for module in taps:
                    gram = both[module].gram.float()
                    if module in found:
                        found[module].gram += gram
                    else:
                        found[module] = _Inputs(gram.clone())
                    if apart and role in STILL:
                        before = found[module].still
                        found[module].still = gram if before is None else before + gram
                    found[module].means[role] = both[module].mean
                for key, layer in streams:
                    seen[key].setdefault(role, {})[layer] = both[key, layer].values
        self._inputs |= {(positions, module): one for module, one in found.items()}
        self._samples |= seen

    def _unseen(self, recipes: Sequence[Recipe]) -> dict[tuple[str, int], Place]:
        """Where the recipes measure directions and nothing is known yet."""
        found: dict[tuple[str, int], Place] = {}
        for recipe in recipes if self._given is None else ():
            # A recipe that asks for a place that is not there is told so by its trial.
            with suppress(BakeError):
                place = self._place(recipe)
                found[place.site, place.back] = place
        return {key: place for key, place in found.items() if key not in self._samples}

    def _place(self, recipe: Recipe) -> Place:
        choice = recipe.fit
        layers = range(self._depth)
        return place_of(self._model, self._base, layers, choice.site, choice.positions.direction)

    @property
    def held(self) -> int:
        """The bytes of matrices and samples."""
        inputs = self._inputs.values()
        kept = [gram for one in inputs for gram in (one.gram, one.still) if gram is not None]
        for roles in self._samples.values():
            kept += [one for layers in roles.values() for one in layers.values()]
        return sum(one.nbytes for one in kept)

    def _directions(self, recipe: Recipe, layers: Sequence[int]) -> dict[int, Tensor]:
        key = hashed([recipe.fit.model_dump(mode="json"), recipe.seed])
        missing = [layer for layer in layers if (key, layer) not in self._vectors]
        if missing:
            found = directions_of(recipe, self._evidence_of(recipe), missing, figured=False)
            self._vectors |= {(key, layer): one for layer, one in found.vectors.items()}
        return {layer: self._vectors[key, layer] for layer in layers}

    def _evidence_of(self, recipe: Recipe) -> Evidence:
        """The evidence with the classes as this recipe has them."""
        choice = recipe.fit
        for role, labels in self._labels.items():
            check_class(recipe, role, labels)
        conversations = {
            role: conversations_of(recipe, role, one) for role, one in self._labels.items()
        }
        weights = [[one.weight for one in found] for found in conversations.values()]
        key = hashed([choice.site, choice.positions.direction, weights])
        if key not in self._evidence:
            layers = range(self._depth)
            place = self._place(recipe)
            moments = {
                role: {layer: _moments(found[layer], conversations[role]) for layer in layers}
                for role, found in self._samples_at(place).items()
            }
            sets = bare(place, self._concepts, layers)
            self._evidence[key] = Evidence(
                self._model, self._depth, place, self._labels, conversations, moments, sets
            )
        return self._evidence[key]

    def _samples_at(self, place: Place) -> dict[str, dict[int, Tensor]]:
        """By role and layer the state [n, d] that every prompt leaves at a place."""
        key = place.site, place.back
        if key not in self._samples:
            label = f"stream, {place.site}, token {-1 - place.back}"
            with progress(label, sum(map(len, self._shown.values()))) as update:
                self._samples[key] = {
                    role: self._samples_of(place, found, update)
                    for role, found in self._shown.items()
                }
        return self._samples[key]

    def _samples_of(
        self, place: Place, shown: Sequence[Conversation], update: Callable[[int], None]
    ) -> dict[int, Tensor]:
        taps = self._stream(place, shown)
        found = collect(self._model, shown, taps, progress=update, state="bare")
        return {layer: one.values for layer, one in found.items()}

    def _stream(self, place: Place, shown: Sequence[Conversation]) -> dict[int, Tap]:
        rows = tuple(range(len(shown)))
        return {layer: place.tap(layer, rows=rows) for layer in range(self._depth)}


def check_memory(
    recipe: str, widths: Iterable[int], base: Checkpoint, null_space: bool = False
) -> None:
    """Refuse to measure more gated writers' inputs [widths] than memory holds beside the model.

    For probes in a null space one more matrix stays of each. Raises RecipeError with both figures.
    """
    widths = list(widths)
    needed = (SUMMED + 4 * null_space) * sum(width**2 for width in widths)
    free = free_memory() - sum(info.stop - info.start for info in base.tensors.values())
    if needed > free:
        raise RecipeError(
            f"{recipe}: search: the inputs of {len(widths)} gated writers take "
            f"{needed / 2**30:.1f} GiB and {max(free, 0) / 2**30:.1f} GiB are free beside the "
            "model; open fewer layers or sites (BAKE_MEMORY sets the memory)"
        )


def asks_null_space(recipe: Recipe) -> bool:
    """Whether some gate's probes are in the null space of what is not steered."""
    return any(isinstance(one, Gate) and one.null_space is not None for one in recipe.edits)


def _moments(samples: Tensor, conversations: Sequence[Conversation]) -> Moments:
    """The moments that a pass with these weights leaves, of samples that are known."""
    rows = range(len(samples))
    found = Moments("mean", rows)
    weights = torch.tensor([one.weight for one in conversations], dtype=torch.float64)
    found.add(samples, weights, rows)
    return found
