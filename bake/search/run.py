"""A search: trials on hooks by the first token, full answers of the best, the chosen recipe."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bake.aligned import aligned
from bake.errors import BakeError, FitError, GuardError, InputError, RecipeError
from bake.evaluate import breaches, judged, rates
from bake.fit.labels import Labelled, labelled
from bake.fit.learned import Said, refusal_openings
from bake.fit.run import probed
from bake.hooks import steered
from bake.journal import Journal, hashed
from bake.judge import Judge
from bake.judge.choice import find_judge
from bake.judge.thinking import Thinking
from bake.manifest import file_hash, versions
from bake.model import LiveModel
from bake.pipeline import Prepared, prepare
from bake.plan import Plan, make_plan
from bake.progress import note, progress
from bake.prompts import Prompt
from bake.recipe import LoadedRecipe, Recipe, Search
from bake.search.captured import Captured, check_memory
from bake.search.draw import drawn, need_optuna
from bake.search.journal import Answered, SearchJournal, journal_path
from bake.search.proxy import Proxy
from bake.search.space import Corner, Point, corners, refused, with_point
from bake.search.trial import Trial, excess, finalists, front
from bake.search.written import write_recipe
from bake.staging import check_file
from bake.work import Work

__all__ = ["search_to_file", "shown"]

SPLIT = "select split"
# What of a recipe changes nothing of a search.
APART = ("name", "description", "output", "export", "verify")


def search_to_file(
    loaded: LoadedRecipe,
    output: Path,
    overwrite: bool = False,
    show: Callable[[str], None] = lambda _: None,
) -> Recipe:
    """Search what the recipe's `search` leaves open, and write the chosen point as a recipe.

    Fitting prompts fit, those of the select split choose, and the test split is not looked at.
    What is finished is in the journal, and a search of the same recipe, prompts, model files and
    versions goes on from there, also with more trials. `show` receives the table in the end.
    Raises RecipeError for a space that makes no recipes, FitError where no trial could be
    fitted or scored, GuardError where no finalist meets the guard on the select split, and what
    a bake raises.
    """
    recipe = loaded.recipe
    check_file(output, overwrite)
    search = _section(loaded)
    need_optuna()
    bench = _Bench(loaded, search)
    bench.check()
    with SearchJournal.opened(journal_path(bench.run)) as journal:
        if journal.trials:
            note(f"search: {len(journal.trials)} trials are finished already, in {journal.path}")
        _try(bench, journal, search)
        candidates = _answer(bench, journal, search)
        show(table(recipe, journal))
        chosen = _chosen(recipe, journal, candidates)
    found = with_point(recipe, chosen.point)
    write_recipe(found, _about(recipe, journal, chosen), output, overwrite)
    show(f"\nchosen: trial {chosen.number}\nwritten: {output}")
    bench.forget()
    return found


def shown(loaded: LoadedRecipe) -> str:
    """The table of a search so far. Raises InputError where none has begun."""
    search = _section(loaded)
    path = journal_path(_Bench(loaded, search).run)
    if not path.exists():
        raise InputError(f"{path}: no search of this recipe has begun; run bake search")
    return table(loaded.recipe, SearchJournal(path))


def table(recipe: Recipe, journal: SearchJournal) -> str:
    """The front of the trials by the first token, then what the finalists answered in full."""
    assert recipe.search is not None
    trials = journal.trials[: recipe.search.trials]
    if journal.base is None:
        return "no trial is finished yet"
    roles = list(journal.base.refusals)
    rows = [("trial", *(f"{role} %" for role in roles), "KL", "setting")]
    rows.append(("base", *(f"{journal.base.refusals[role]:.1f}" for role in roles), "0", ""))
    for one in front(trials, recipe.guard):
        rows.append(_row(one, roles))
    failed = sum(one.figures is None for one in trials)
    allowed = sum(one.allowed for one in trials)
    lines = [
        f"first token, {len(trials)} trials ({allowed} within the limits, {failed} without a fit):",
        aligned(rows),
    ]
    if journal.answered:
        rows = [("trial", *roles, "")]
        for number, found in journal.answered.items():
            cells = [str(found[role]) for role in roles]
            name = "base" if number is None else str(number)
            broken = "" if number is None else _broken(recipe, journal, number)
            rows.append((name, *cells, broken))
        lines += ["", f"answers in full, {SPLIT}:", aligned(rows)]
    return "\n".join(lines)


def _section(loaded: LoadedRecipe) -> Search:
    if loaded.recipe.search is None:
        raise RecipeError(
            f"{loaded.source}: search: this recipe leaves nothing open; say what in this key, as "
            "in docs/search.md"
        )
    return loaded.recipe.search


class _Bench:
    """What trials are made on; nothing is loaded before a trial or an answer asks for it."""

    def __init__(self, loaded: LoadedRecipe, search: Search) -> None:
        self._loaded, self._recipe, self._search = loaded, loaded.recipe, search

    @cached_property
    def ready(self) -> Prepared:
        return prepare(self._recipe)

    @cached_property
    def run(self) -> str:
        """A hash of what decides a search: recipe, prompts, model files, versions."""
        values = self._recipe.model_dump(mode="json")
        for name in APART:
            del values[name]
        for name in ("limit", "runtimes"):
            del values["evaluate"][name]
        for name in ("trials", "finalists"):
            del values["search"][name]
        base = self.ready.base
        files = [shard.file for shard in base.shards] + list(base.sidecars())
        hashes = {path.name: file_hash(path) for path in files}
        used = {**versions(), "optuna": version("optuna")}
        given = self.ready.directions_hash
        return hashed([values, self.prompts_used, hashes, used, given])

    @property
    def prompts_used(self) -> dict[str, dict[str, str]]:
        """The fingerprints of the splits that are looked at."""
        return {
            role: {"fit": parts["fit"], "select": parts["select"]}
            for role, parts in self.ready.fingerprints.items()
        }

    @cached_property
    def corners(self) -> list[tuple[Corner, Plan]]:
        found = []
        for corner in corners(self._loaded):
            try:
                found.append((corner, self.plan(corner.recipe)))
            except BakeError as error:
                message = f"{corner.value}: {error}"
                raise refused(self._loaded, corner.place, message) from error
        return found

    def check(self) -> None:
        """Refuse from headers and text alone what no trial could be made of."""
        if self._recipe.directions is not None:
            for corner, _ in self.corners:
                if corner.key.startswith("fit."):
                    message = f"directions are those of {self._recipe.directions}; leave one out"
                    raise refused(self._loaded, corner.place, message)
        read = {
            edit.tensor: edit
            for corner, plan in self.corners
            for edit in plan.edits
            if edit.tensor.removesuffix(".weight") in probed(plan, corner.recipe)
        }
        width = self.ready.plan.width
        sizes = [edit.shape[0] * edit.shape[1] // width for edit in read.values()]
        check_memory(self._loaded.source, sizes, self.ready.base)

    def plan(self, recipe: Recipe) -> Plan:
        """The plan of a point's recipe."""
        return make_plan(recipe, self.ready.base, self.ready.arch, self.ready.directions)

    @cached_property
    def model(self) -> LiveModel:
        torch.manual_seed(self._recipe.seed)
        folder, system = self.ready.base.folder, self._recipe.system_prompt
        found = LiveModel.load(folder, self.ready.arch, system=system)
        return replace(found, work=Work(journal=self._passes))

    @cached_property
    def judge(self) -> Judge:
        return find_judge(self._recipe.judge)

    @cached_property
    def _passes(self) -> Journal:
        """The finished batches of what is measured once."""
        return Journal.of(self.run)

    def forget(self) -> None:
        """Remove what only an interrupted search needs."""
        self._passes.remove()

    @cached_property
    def labels(self) -> dict[str, list[Labelled]]:
        every = self.ready.part("fit", self._recipe.fit.prompts_per_class)
        with progress("answers", sum(map(len, every.values()))) as update:
            return {
                role: labelled(self.model, self._recipe, prompts, self.judge, update)
                for role, prompts in every.items()
            }

    @cached_property
    def captured(self) -> Captured:
        found = Captured(
            *(self.model, self.ready.base, self._recipe, self.labels, self.ready.texts),
            *(self.ready.concept_prompts, self.ready.directions),
        )
        found.read_inputs(
            [plan for _, plan in self.corners], [corner.recipe for corner, _ in self.corners]
        )
        return found

    @cached_property
    def prompts(self) -> dict[str, tuple[Prompt, ...]]:
        """The prompts that choose."""
        return self.ready.part("select", self._search.prompts)

    @cached_property
    def proxy(self) -> Proxy:
        labels = [one for found in self.labels.values() for one in found]
        sides = [
            [Said(one.start, one.answer) for one in labels if one.side == side] for side in (1, -1)
        ]
        openings = refusal_openings(*sides)
        if not openings:
            raise FitError(
                "search: no token opens more of the refused answers than of the others, so trials "
                "cannot be told apart by the first token; give other prompts or another judge"
            )
        begins = [_lowest(plan) for _, plan in self.corners]
        layers = [layer - 1 for layer in range(min(begins), max(begins) + 1) if layer > 0]
        with progress("select prompts", sum(map(len, self.prompts.values()))):
            return Proxy(self.model, self.prompts, openings, layers)

    def trial(self, number: int, values: Mapping[str, Any], point: Point) -> Trial:
        """Fit a point and look at the first token; a point that cannot be fitted says why."""
        try:
            found = with_point(self._recipe, point)
            plan = self.plan(found)
            interventions = self.captured.interventions(found, plan)
            figures = self.proxy.figures(interventions, _lowest(plan))
        except (ValueError, BakeError) as error:
            return Trial(number, values, point, failed=str(error))
        over = excess(self._recipe.guard, self._search.kl_at_most, self.proxy.base, figures)
        return Trial(number, values, point, figures, over)

    def answers(self, point: Point | None) -> Answered:
        """Refusals by role of answers in full, of the base model or at a point."""
        choice, marks = self._recipe.evaluate, self._recipe.judge.thinking
        interventions: Sequence[Any] = ()
        if point is not None:
            found = with_point(self._recipe, point)
            interventions = self.captured.interventions(found, self.plan(found))
        answer = partial(self.model.answer, tokens=choice.answer_tokens, batch_size=choice.batch)
        thinking = Thinking(marks.begin, marks.end)
        with steered(self.model, interventions):
            said = judged(
                *(self.prompts, self.model.render, answer, self.model.text, self.judge, thinking)
            )
        return rates(said)


def _try(bench: _Bench, journal: SearchJournal, search: Search) -> None:
    """Make the trials that are not in the journal; each that joins the front is shown."""
    if len(journal.trials) >= search.trials:
        return
    recipe = bench.ready.recipe
    if journal.base is None:
        journal.begin(bench.prompts_used, bench.proxy.base)
    bench.captured  # noqa: B018 (its passes are no part of a trial)
    with progress("trials", search.trials) as update:
        update(len(journal.trials))
        while (number := len(journal.trials)) < search.trials:
            values, point = drawn(recipe, journal.trials, number)
            found = bench.trial(number, values, point)
            journal.add(found)
            update(1)
            if found in front(journal.trials, recipe.guard):
                note(_told(found))
    if all(one.figures is None for one in journal.trials):
        raise FitError(f"search: no trial could be fitted; the last: {journal.trials[-1].failed}")


def _answer(bench: _Bench, journal: SearchJournal, search: Search) -> list[Trial]:
    """Have the finalists answer in full, and the base; what the journal has is not done again."""
    recipe = bench.ready.recipe
    candidates = finalists(journal.trials[: search.trials], recipe.guard, search.finalists)
    wanted: dict[int | None, Point | None] = {None: None}
    wanted |= {one.number: one.point for one in candidates}
    missing = [number for number in wanted if number not in journal.answered]
    with progress("answers in full", len(missing), bool(missing)) as update:
        for number in missing:
            journal.answer(number, bench.answers(wanted[number]))
            update(1)
    return candidates


def _chosen(recipe: Recipe, journal: SearchJournal, candidates: Sequence[Trial]) -> Trial:
    """The finalist within the guard with the best target, or the smaller divergence where equal.

    Raises GuardError with what the best of the others breaks.
    """
    up = recipe.guard.target_at_least is not None

    def rank(one: Trial) -> tuple[float, float, int]:
        assert one.figures is not None
        target = journal.answered[one.number]["target"].percent
        return (-target if up else target), one.figures.kl, one.number

    ranked = sorted(candidates, key=rank)
    kept = [one for one in ranked if not _broken(recipe, journal, one.number)]
    if kept:
        return kept[0]
    nearest = min(ranked, key=lambda one: len(_broken(recipe, journal, one.number).split(";")))
    raise GuardError(
        f"search: none of {len(ranked)} finalists meets the guard on the {SPLIT}; trial "
        f"{nearest.number}: {_broken(recipe, journal, nearest.number)}"
    )


def _broken(recipe: Recipe, journal: SearchJournal, number: int) -> str:
    """What of the guard a finalist breaks; empty where nothing."""
    before, after = journal.answered[None], journal.answered[number]
    start = f"guard, {SPLIT}: "
    lines = breaches(recipe.guard, before, after, SPLIT)
    return "; ".join(line.removeprefix(start) for line in lines)


def _lowest(plan: Plan) -> int:
    """The first block that the plan edits, -1 for an embedding."""
    return min(-1 if edit.layer is None else edit.layer for edit in plan.edits)


def _told(one: Trial) -> str:
    """A trial that has joined the front, on one line."""
    assert one.figures is not None
    rates = ", ".join(f"{role} {rate:.1f} %" for role, rate in one.figures.refusals.items())
    setting = " ".join(f"{key}={value}" for key, value in one.point.items())
    return f"trial {one.number} joins the front: {rates}, KL {one.figures.kl:.4f}: {setting}"


def _row(one: Trial, roles: Iterable[str]) -> tuple[str, ...]:
    assert one.figures is not None
    setting = " ".join(f"{key}={value}" for key, value in one.point.items())
    cells = (f"{one.figures.refusals[role]:.1f}" for role in roles)
    return (str(one.number), *cells, f"{one.figures.kl:.4f}", setting)


def _about(recipe: Recipe, journal: SearchJournal, chosen: Trial) -> str:
    """What the written recipe says of where it comes from."""
    assert recipe.search is not None and chosen.figures is not None
    before, after = journal.answered[None], journal.answered[chosen.number]
    rows = [(role, f"{before[role]} -> {after[role]}") for role in after]
    return (
        f"{recipe.description or recipe.name}\n"
        f"Chosen by bake search: trial {chosen.number} of {recipe.search.trials}, refusals of the "
        f"{SPLIT} before and after:\n{aligned(rows)}\n"
        f"first-token KL on general prompts {chosen.figures.kl:.4f}"
    )
