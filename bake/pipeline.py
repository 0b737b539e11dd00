"""From a recipe to a published folder: plan, fit, write, verify, judge, publish."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from bake.errors import CheckpointError, GuardError
from bake.export.conversion import Reference
from bake.export.same_model import check_same_model
from bake.fit.conversations import weighed_roles
from bake.fit.run import Fitted, fit, needs_prompts, probed_apart
from bake.journal import Journal
from bake.judge import Judge
from bake.judge.choice import find_judge
from bake.measure import Artefacts, measure
from bake.model import LiveModel
from bake.prepare import (
    Prepared,
    base_hashes,
    base_stamps,
    check_space,
    check_trust,
    loaded_model,
    prepare,
    run_of,
    saved_form,
)
from bake.progress import progress
from bake.recipe import Gate, LoadedRecipe, Recipe
from bake.record import failed_folder, record, record_failure
from bake.report import guard_breaches, table
from bake.saved_plan import SavedPlan
from bake.staging import aside_of, check_output, staged
from bake.work import ALONE, Work
from bake.writing import Written, converted, edits_of, reference_of, road_of, write_all

__all__ = ["bake", "fit_of"]


def bake(
    loaded: LoadedRecipe,
    *,
    overwrite: bool = False,
    planned: SavedPlan | None = None,
    llama_cpp: Path | None = None,
    trusted: bool = False,
    show: Callable[[str], None] = lambda _: None,
) -> Path:
    """Run a recipe to its end and return the output folder, which appears only then.

    `planned` is a saved plan that must be the recipe's still, `llama_cpp` the tree whose
    converter is taken (`find_converter`), `trusted` confirms the recipe's trust_remote_code.
    `show` receives the table of results, also when the guard then refuses them.
    Raises a BakeError of the kind that says what failed: the input, the guard or
    the verification. Nothing is left behind then, but of a broken guard the evidence: report,
    figures and answers, without weights, in `failed_folder`. The processes of `accelerate
    launch` share the work, and one of them shows and publishes.
    """
    recipe = loaded.recipe
    failed = failed_folder(recipe.folder)
    check_trust(recipe, trusted)
    work = Work.launched()
    torch.manual_seed(recipe.seed)
    with work.main_first():
        if work.main:
            check_output(recipe.folder, overwrite)
            check_output(failed, overwrite)
        ready = prepare(recipe)
        if work.main:
            _check(loaded, ready, planned)
    road = road_of(ready, llama_cpp) if work.main else None
    judge = find_judge(recipe.judge)
    with (
        _staged(work, recipe, overwrite) as staging,
        aside_of(staging) if work.main else nullcontext(staging) as aside,
    ):
        stamps, hashes = base_stamps(ready), base_hashes(ready, work)
        journal = Journal.of(run_of(ready, hashes))
        reference = reference_of(ready, road, aside) if road else None
        model = replace(loaded_model(ready), work=replace(work, journal=journal))
        fitted = fit_of(ready, model, judge)
        # Machines of several kinds may round differently: what is written is of one.
        edits = work.by_main(lambda: edits_of(ready, fitted))
        written = write_all(loaded, ready, model, fitted, edits, staging, aside)
        if road and reference:
            alone = replace(model, work=ALONE)
            written = converted(
                *(loaded, ready, road, reference, alone, fitted, edits, written, staging, aside)
            )
        artefacts = work.by_main(lambda: _artefacts(ready, written, reference, staging))
        prompts = ready.part("test", recipe.evaluate.limit)
        texts = ready.texts.test
        measured = measure(recipe, model, fitted.interventions, artefacts, prompts, texts, judge)
        if work.main:
            show(table(measured, recipe.guard))
            broken = guard_breaches(recipe, measured)
            if broken:
                with staged(failed, overwrite) as kept:
                    record_failure(loaded, ready, hashes, fitted, written, measured, broken, kept)
                raise GuardError(
                    "\n".join([*broken, f"nothing is baked; {failed} has the evidence"])
                )
            now = base_stamps(ready)
            for path, stamp in stamps.items():
                if now.get(path) != stamp:
                    raise CheckpointError(f"{path}: changed while it was baked; bake it again")
            record(loaded, ready, model, hashes, fitted, written, measured, staging)
    work.wait()
    journal.remove()
    return recipe.folder


def _check(loaded: LoadedRecipe, ready: Prepared, planned: SavedPlan | None) -> None:
    """Refuse what can be refused before anything is written."""
    if planned:
        planned.check(saved_form(loaded, ready))
    if ready.gguf:
        check_same_model(ready.gguf, ready.base, ready.arch)
    check_space(ready)


@contextmanager
def _staged(work: Work, recipe: Recipe, overwrite: bool) -> Iterator[Path]:
    """The folder that all processes write into; one makes it, and publishes it in the end."""
    if not work.main:
        yield work.by_main(Path)
        return
    with staged(recipe.folder, overwrite, recipe.export.safetensors) as staging:
        yield work.by_main(lambda: staging)


def _artefacts(
    ready: Prepared, written: Written, reference: Reference | None, staging: Path
) -> Artefacts:
    """What is measured, of what was written."""
    base_gguf = reference.file if reference else ready.gguf
    return Artefacts(
        ready.base.folder,
        staging if ready.recipe.export.safetensors else None,
        base_gguf.path if base_gguf else None,
        staging / written.gguf if written.gguf else None,
        staging / written.lora if written.lora else None,
        tuple(ready.arch.gguf_name(ready.plan.name(edit.tensor)) for edit in ready.plan.edits),
        written.exact,
    )


def fit_of(ready: Prepared, model: LiveModel, judge: Judge) -> Fitted:
    """What a bake of a prepared recipe fits; raises FitError as `fit` does."""
    recipe, plan = ready.recipe, ready.plan
    limit = recipe.fit.prompts_per_class
    prompts = ready.part("fit", limit)
    count = len(ready.texts.fit[:limit])
    concepts = ready.concept_prompts
    asked = sum(map(len, prompts.values()))
    own = recipe.fit.positions.decision()
    read_at = [*dict.fromkeys((own, *probed_apart(plan, recipe)))]
    for spec, step in zip(recipe.edits, plan.steps, strict=True):
        if isinstance(spec, Gate) and spec.ordered:
            read_at += [recipe.decides(spec)] * len(step.edits)
    # What is in front of where gates decide is shown beside it, and once what all begin with.
    asides = sum(asked + 1 for one in read_at if one.question == "shut")
    blocks = sum(one.op == "gate" and one.form == "block" for one in recipe.edits)
    passes = len(read_at) + 2 * blocks
    weighed = sum(len(prompts[role]) for role in weighed_roles(recipe))
    others = sum(map(len, concepts.values())) + weighed + asides
    total = asked + passes * (asked + count) + others
    shown = needs_prompts(plan, recipe, ready.directions, ready.probes)
    with progress("fit", total, shown and model.work.main) as update:
        return fit(
            *(model, ready.base, plan, recipe, prompts, ready.texts, judge, update),
            directions=ready.directions,
            concepts=concepts,
        )
