"""Fits without a bake: directions in a file, and a choice of where to measure them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from bake.aligned import aligned
from bake.directions import Directions, save_directions
from bake.directions.value import FIGURES
from bake.errors import DirectionsError, FitError
from bake.fit.estimate import roles_shown
from bake.fit.run import fit_directions, labels_of_direction, measured_directions
from bake.fit.select import DEPTH, DIVERGENCE, Candidate, best
from bake.journal import Journal
from bake.judge import Judge
from bake.judge.choice import find_judge
from bake.model import LiveModel
from bake.plan import direction_layers
from bake.prepare import Prepared, base_hashes, check_trust, loaded_model, prepare, run_of
from bake.progress import note, progress
from bake.prompts import Prompt
from bake.recipe import LoadedRecipe, Recipe
from bake.recipe.values import BY_GRADIENT, SEVERAL
from bake.staging import check_file, staged_file
from bake.work import Work

__all__ = ["fit_to_file", "select_to_file"]

Site = Literal["mid", "out"]


def fit_to_file(
    loaded: LoadedRecipe,
    output: Path,
    layers: Sequence[int] | None = None,
    overwrite: bool = False,
    show: Callable[[str], None] = lambda _: None,
    trusted: bool = False,
) -> Directions:
    """Fit a recipe's directions, and write them with their figures; nothing is baked.

    `layers` are those that the edits need unless others are given, `show` receives the table, and
    `trusted` confirms the recipe's trust_remote_code.
    The processes of `accelerate launch` share the prompts, and one of them shows and writes.
    Raises a BakeError as `bake` does; the file appears when all of it is complete. What was
    finished before an end of any kind is kept in the cache folder, and not done again by a fit
    of the same recipe, model files and versions.
    """
    recipe = loaded.recipe
    check_file(output, overwrite)
    check_trust(recipe, trusted)
    if output.suffix == ".gguf" and recipe.fit.estimator in SEVERAL and recipe.fit.basis > 1:
        raise DirectionsError(
            f"{output}: a control vector has one direction a layer, and fit.estimator: "
            f"{recipe.fit.estimator} gives {recipe.fit.basis}; write .safetensors, or set "
            "fit.basis=1"
        )
    with _begun(recipe, layers, "fit") as run:
        total = 2 * run.count + sum(map(len, run.concepts.values()))
        with progress("fit", total, run.work.main) as update:
            directions, _ = fit_directions(
                *(run.model, run.ready.base, recipe, run.layers, run.prompts, run.judge),
                *(run.concepts, update),
            )
        if run.work.main:
            save_directions(directions, output, overwrite)
            show(f"{directions.table()}\n\nwritten: {output}")
    return directions


def select_to_file(
    loaded: LoadedRecipe,
    output: Path,
    layers: Sequence[int] | None = None,
    sites: Sequence[Site] = ("out",),
    tokens: int = 1,
    overwrite: bool = False,
    show: Callable[[str], None] = lambda _: None,
    trusted: bool = False,
) -> Candidate | None:
    """Measure a direction at every site, layer and token asked for; write their figures as JSON.

    `tokens` are the last ones of the prompt. Prompts are answered once, to be labelled, and no
    text is written for a candidate; the one that `best` chooses is returned. Raises FitError for an
    estimator whose directions are not of the places asked for. Everything else is as in
    `fit_to_file`.
    """
    recipe = loaded.recipe
    check_file(output, overwrite)
    check_trust(recipe, trusted)
    _check_selectable(recipe, sites)
    variants = [
        (site, -1 - back, _measured_at(recipe, site, -1 - back))
        for site in sites
        for back in range(tokens)
    ]
    found: list[Candidate] = []
    # What a model may lack is the middle of its blocks: that is asked before it is loaded.
    asked = next((one for site, _, one in variants if site == "mid"), variants[0][2])
    with _begun(asked, layers, "select") as run:
        with progress("answers", run.count, run.work.main) as update:
            labels = labels_of_direction(run.model, recipe, run.prompts, run.judge, update)
        for site, token, variant in variants:
            with progress(f"{site}, token {token}", run.count, run.work.main) as update:
                directions = measured_directions(
                    run.model, run.ready.base, variant, run.layers, labels, run.concepts, update
                )
            found += [
                Candidate(site, token, layer, directions.figures[layer]) for layer in run.layers
            ]
        chosen = best(found, run.ready.plan.layers)
        if run.work.main:
            with staged_file(output, overwrite) as staging:
                text = json.dumps(_selection(recipe, found, chosen), indent=1)
                staging.write_text(f"{text}\n", encoding="utf-8")
            show(f"{_table(found, chosen)}\n\nwritten: {output}")
    return chosen


@dataclass(frozen=True)
class _Run:
    """A fit that has begun: what is shown to which model, and who judges."""

    ready: Prepared
    model: LiveModel
    judge: Judge
    layers: Sequence[int]
    prompts: Mapping[str, Sequence[Prompt]]
    concepts: Mapping[str, Sequence[Prompt]]

    @property
    def work(self) -> Work:
        return self.model.work

    @property
    def count(self) -> int:
        """The prompts of all roles."""
        return sum(map(len, self.prompts.values()))


@contextmanager
def _begun(recipe: Recipe, layers: Sequence[int] | None, label: str) -> Iterator[_Run]:
    """Prepare a fit, and load its model; its journal goes when the fit is done."""
    work = Work.launched()
    torch.manual_seed(recipe.seed)
    with work.main_first():
        ready = prepare(recipe.model_copy(update={"directions": None}))
    chosen = direction_layers(recipe) if layers is None else layers
    ready.arch.check_layers(chosen, ready.base.config, "--layers")
    judge = find_judge(recipe.judge)
    journal = Journal.of(run_of(ready, base_hashes(ready, work)))
    if work.main and journal.finished:
        note(f"{label}: {journal.finished} batches are finished already, in {journal.folder}")
    model = replace(loaded_model(ready), work=replace(work, journal=journal))
    shown = roles_shown(recipe.fit)
    every = ready.part("fit", recipe.fit.prompts_per_class)
    prompts = {role: found for role, found in every.items() if role in shown}
    yield _Run(ready, model, judge, chosen, prompts, ready.concept_prompts)
    journal.remove()


def _check_selectable(recipe: Recipe, sites: Sequence[Site]) -> None:
    """Refuse an estimator that chooses by itself, or that learns at another site."""
    estimator = recipe.fit.estimator
    if estimator == "cosmic":
        raise FitError(
            "fit.estimator: cosmic chooses the layer by itself; take mean-difference, whose "
            "table has COSMIC's score"
        )
    if estimator in BY_GRADIENT and "mid" in sites:
        raise FitError(f"--site: {estimator} learns a vector behind whole blocks; use out")


def _measured_at(recipe: Recipe, site: Site, token: int) -> Recipe:
    """The recipe with the direction measured elsewhere, and each layer's own."""
    positions = recipe.fit.positions.model_copy(update={"direction": token})
    changed = {"site": site, "positions": positions, "layer": None}
    return recipe.model_copy(update={"fit": recipe.fit.model_copy(update=changed)})


def _selection(
    recipe: Recipe, found: Sequence[Candidate], chosen: Candidate | None
) -> dict[str, Any]:
    return {
        "format": "bake.selection",
        "version": 1,
        "model": recipe.model,
        "recipe": recipe.name,
        "estimator": recipe.fit.estimator,
        "limits": {"depth": DEPTH, "kl": DIVERGENCE, "induce": 0.0},
        "candidates": [one.as_json() for one in found],
        "chosen": chosen.as_json() if chosen else None,
    }


def _table(found: Sequence[Candidate], chosen: Candidate | None) -> str:
    """The candidates with their figures, and what makes a recipe take the chosen one."""
    names = [name for name in FIGURES if any(name in one.figures for one in found)]
    rows = [("site", "token", "layer", *names)]
    for one in found:
        written = (f"{one.figures[name]:.3f}" if name in one.figures else "" for name in names)
        rows.append((one.site, str(one.token), str(one.layer), *written))
    last = f"chosen: {chosen.overrides}" if chosen else "none is within the limits of docs/fit.md"
    return f"{aligned(rows)}\n\n{last}"
