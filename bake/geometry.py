"""The geometry of refusal on a live model: a map of cosines, and what each direction trades.

For every kind of refusal the direction behind one block; the cosines between them; and for a
range of strengths how much of every role is refused with the direction added, all at one
length, beside a random direction and that of refusal as such. After "There Is More to Refusal
than a Single Direction" (arXiv:2602.02132), which finds the directions apart and the trades
alike; a direction is selective only where its curve leaves those of the two controls.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bake.aligned import aligned
from bake.errors import FitError
from bake.evaluate import judged, rates
from bake.fit.evidence import bare
from bake.fit.geometry import cosines, generic, of_length, random_direction
from bake.fit.labels import labelled
from bake.fit.mean_difference import mean_difference
from bake.fit.place import Place
from bake.fit.samples import Samples
from bake.fit.scores import Observed
from bake.fit.shifted import shifted
from bake.fit.spread import bootstrap_cosine
from bake.judge import Judge
from bake.judge.choice import find_judge
from bake.judge.thinking import Thinking
from bake.model import Batch, LiveModel, batches
from bake.plan import direction_layers
from bake.prepare import Prepared, prepare
from bake.progress import progress
from bake.prompts import Prompt, load_splits
from bake.prompts.kinds import KINDS
from bake.recipe import LoadedRecipe, Recipe
from bake.staging import check_file, staged_file

__all__ = ["Question", "geometry_of", "geometry_to_file", "table"]

# As many prompts as a direction of behaviour needs; below it a set counts whole.
MINIMUM = 8
CONTROLS = {"generic": "refusal as such, all kinds alike", "random": "any direction at all"}


@dataclass(frozen=True)
class Question:
    """What is asked: of which kinds, behind which block, at which strengths, of how many prompts.

    Strengths count in lengths of the generic direction.
    """

    kinds: tuple[str, ...] = tuple(KINDS)
    layer: int | None = None
    strengths: tuple[float, ...] = (-1.5, -1.0, -0.5, 0.5, 1.0, 1.5)
    limit: int = 16


def geometry_to_file(
    loaded: LoadedRecipe, question: Question, output: Path, overwrite: bool = False
) -> dict[str, object]:
    """Answer the question for a recipe's model and write it as JSON; nothing is baked.

    The block is the middle one of those that the edits need, unless the question names one.
    Raises a BakeError as `bake fit` does.
    """
    recipe = loaded.recipe
    check_file(output, overwrite)
    kinds = {name: load_splits(name, language="any").fit for name in question.kinds}
    ready = prepare(recipe.model_copy(update={"directions": None}))
    layers = direction_layers(recipe)
    layer = layers[len(layers) // 2] if question.layer is None else question.layer
    ready.arch.check_layers((layer,), ready.base.config, "--layer")
    judge = find_judge(recipe.judge)
    model = LiveModel.load(ready.base.folder, ready.arch, system=ready.recipe.system_prompt)
    with progress("geometry", _total(ready, kinds, question)) as update:
        found = geometry_of(model, ready, kinds, layer, question, judge, update)
    with staged_file(output, overwrite) as staging:
        staging.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def geometry_of(
    model: LiveModel,
    ready: Prepared,
    kinds: Mapping[str, Sequence[Prompt]],
    layer: int,
    question: Question,
    judge: Judge,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, object]:
    """The map and the trades as plain values, as docs/geometry.md has them.

    Directions are of the fitting split, trades of the selection split. A kind's direction is
    that of the prompts that the model refuses, and where it refuses fewer than eight, of all of
    them, which `by` says. Raises FitError where too few of the contrast class are answered.
    """
    recipe = ready.recipe
    contrast = ready.part("fit", recipe.fit.prompts_per_class)[recipe.fit.contrast]
    answered, count = _class(model, recipe, contrast, layer, judge, progress, refused=False)
    if count < MINIMUM:
        raise FitError(
            f"prompts.{recipe.fit.contrast}: only {count} of {len(contrast)} fitting prompts were "
            f"answered by the base model, at least {MINIMUM} are needed; give more or other prompts"
        )
    samples, described = {}, {}
    for name, prompts in kinds.items():
        chosen = prompts[: recipe.fit.prompts_per_class]
        samples[name], count = _class(model, recipe, chosen, layer, judge, progress, refused=True)
        described[name] = {
            "meaning": KINDS.get(name, ""),
            "prompts": len(chosen),
            "refused": count,
            "by": "behaviour" if count >= MINIMUM else "set",
        }
    directions = {name: one.mean - answered.mean for name, one in samples.items()}
    for name, one in samples.items():
        if not directions[name].any():
            raise FitError(
                f"{name}: has the same mean as prompts.{recipe.fit.contrast} behind layer {layer}, "
                "so there is no direction between them; leave out this kind"
            )
        described[name]["gap"] = float(directions[name].norm())
        described[name]["spread"] = bootstrap_cosine(
            mean_difference, one, answered, max(recipe.fit.resamples, 1), recipe.seed
        )
    directions["generic"] = generic(
        {name: one.mean for name, one in samples.items()}, answered.mean
    )
    length = float(directions["generic"].norm())
    directions["random"] = random_direction(len(answered.mean), recipe.seed)
    trades = _Trades(model, ready, layer, question, judge, progress)
    return {
        "format": "bake.geometry",
        "version": 1,
        "model": recipe.model,
        "recipe": recipe.name,
        "layer": layer,
        "seed": recipe.seed,
        "contrast": recipe.fit.contrast,
        "kinds": described,
        "controls": CONTROLS,
        "cosines": {"names": list(directions), "values": cosines(directions)},
        "trades": {
            "length": length,
            "prompts": trades.counts,
            "base": trades.of(None),
            "curves": {
                name: [
                    {"strength": strength, **trades.of(strength * one)}
                    for strength in question.strengths
                ]
                for name, one in of_length(directions, length).items()
            },
        },
    }


def table(found: Mapping[str, Any]) -> str:
    """The directions with their prompts, spread, and cosines to both controls, as plain text."""
    names, values = found["cosines"]["names"], found["cosines"]["values"]
    rows = [("kind", "refused", "direction of", "gap", "spread", *CONTROLS)]
    for name, cosine in zip(names, values, strict=True):
        kind = found["kinds"].get(name)
        near = [f"{cosine[names.index(control)]:.2f}" for control in CONTROLS]
        facts = ("", "", "", "")
        if kind:
            refused = f"{kind['refused']}/{kind['prompts']}"
            facts = (refused, kind["by"], f"{kind['gap']:.3g}", f"{kind['spread']:.2f}")
        rows.append((name, *facts, *near))
    return aligned(rows)


class _Trades:
    """Refusals by role on the selection split, with a vector added behind a block."""

    def __init__(
        self,
        model: LiveModel,
        ready: Prepared,
        layer: int,
        question: Question,
        judge: Judge,
        progress: Callable[[int], None],
    ) -> None:
        self._model, self._layer, self._judge = model, layer, judge
        self._recipe, self._progress = ready.recipe, progress
        self._depth = ready.arch.layer_count(ready.base.config)
        self._prompts = ready.part("select", question.limit)
        starts = [model.render(one.text) for one in self._prompts["general"]]
        self._general = list(batches(starts, model.tokenizer.pad_token_id, 16))
        self._clean = [self._last(batch) for batch in self._general]

    @property
    def counts(self) -> dict[str, int]:
        """How many prompts of every role take part."""
        return {role: len(chosen) for role, chosen in self._prompts.items()}

    def of(self, vector: Tensor | None) -> dict[str, object]:
        """The percentages of refusals, and KL(clean ‖ steered) at general prompts' last tokens."""
        model, marks = self._model, self._recipe.judge.thinking
        tokens = self._recipe.fit.answers.tokens
        add = {} if vector is None else {self._layer: vector.float()}
        size = self._recipe.evaluate.batch

        def answer(starts: Sequence[Sequence[int]]) -> list[list[int]]:
            return model.answer(starts, tokens, size, progress=self._progress)

        with shifted(model, self._depth, add=add):
            answers = judged(
                *(self._prompts, model.render, answer, model.text, self._judge),
                Thinking(marks.begin, marks.end),
            )
            moved = [self._last(batch) for batch in self._general]
        lost = [
            (clean.exp() * (clean - after)).sum(1)
            for clean, after in zip(self._clean, moved, strict=True)
        ]
        return {
            "refused": {role: rate.percent for role, rate in rates(answers).items()},
            "divergence": float(torch.cat(lost).mean()),
        }

    def _last(self, batch: Batch) -> Tensor:
        return torch.log_softmax(self._model.logits(batch)[:, -1], -1)


def _class(
    model: LiveModel,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    layer: int,
    judge: Judge,
    progress: Callable[[int], None],
    *,
    refused: bool,
) -> tuple[Samples, int]:
    """The states of the prompts that behave so, or of all where too few do, and how many do."""
    labels = labelled(model, recipe, prompts, judge, progress)
    side = 1 if refused else -1
    behaves = torch.tensor([one.side == side for one in labels])
    count = int(behaves.sum())
    found: Observed = bare(Place(model), {"": prompts}, (layer,), progress, samples=True)[""][layer]
    weights = behaves if count >= MINIMUM else torch.ones(len(prompts))
    return Samples.of(found.values, weights.double(), found.topics), count


def _total(ready: Prepared, kinds: Mapping[str, Sequence[Prompt]], question: Question) -> int:
    """The prompts that are answered or measured in all."""
    limit = ready.recipe.fit.prompts_per_class
    contrast = ready.part("fit", limit)[ready.recipe.fit.contrast]
    fitted = len(contrast) + sum(len(chosen[:limit]) for chosen in kinds.values())
    asked = sum(map(len, ready.part("select", question.limit).values()))
    curves = (len(kinds) + len(CONTROLS)) * len(question.strengths)
    return 2 * fitted + (1 + curves) * asked
