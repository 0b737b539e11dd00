"""A search: trials on hooks by the first token, full answers of the best, the chosen recipe."""

from collections.abc import Callable, Sequence
from pathlib import Path

from bake.errors import FitError, GuardError, InputError, RecipeError
from bake.progress import note, progress
from bake.recipe import LoadedRecipe, Recipe, Search
from bake.search.bench import Bench
from bake.search.draw import drawn, need_optuna
from bake.search.journal import SearchJournal, journal_path
from bake.search.shown import SPLIT, about, broken, table, told
from bake.search.space import Point, with_point
from bake.search.trial import Trial, finalists, front
from bake.search.written import write_recipe
from bake.staging import check_file

__all__ = ["search_to_file", "shown"]


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
    bench = Bench(loaded, search)
    bench.check()
    with SearchJournal.opened(journal_path(bench.run)) as journal:
        if journal.trials:
            note(f"search: {len(journal.trials)} trials are finished already, in {journal.path}")
        _try(bench, journal, search)
        candidates = _answer(bench, journal, search)
        show(table(recipe, journal))
        chosen = _chosen(recipe, journal, candidates)
    found = with_point(recipe, chosen.point)
    write_recipe(found, about(recipe, journal, chosen), output, overwrite)
    show(f"\nchosen: trial {chosen.number}\nwritten: {output}")
    bench.forget()
    return found


def shown(loaded: LoadedRecipe) -> str:
    """The table of a search so far. Raises InputError where none has begun."""
    search = _section(loaded)
    path = journal_path(Bench(loaded, search).run)
    if not path.exists():
        raise InputError(f"{path}: no search of this recipe has begun; run bake search")
    return table(loaded.recipe, SearchJournal(path))


def _section(loaded: LoadedRecipe) -> Search:
    if loaded.recipe.search is None:
        raise RecipeError(
            f"{loaded.source}: search: this recipe leaves nothing open; say what in this key, as "
            "in docs/search.md"
        )
    return loaded.recipe.search


def _try(bench: Bench, journal: SearchJournal, search: Search) -> None:
    """Make the trials that are not in the journal; each that joins the front is shown."""
    recipe = bench.ready.recipe
    before = len(journal.trials)
    if before < search.trials:
        bench.measure()
        if journal.base is None:
            journal.begin(bench.prompts_used, bench.proxy.base)
        with progress("trials", search.trials) as update:
            update(before)
            while (number := len(journal.trials)) < search.trials:
                values, point = drawn(recipe, journal.trials, number)
                found = bench.trial(number, values, point, journal.trials)
                journal.add(found)
                update(1)
                if number == before:
                    note(f"search: {bench.held / 2**30:.2f} GiB are held for all trials")
                if found in front(journal.trials, recipe.guard):
                    note(told(found))
    if all(one.figures is None for one in journal.trials):
        raise FitError(f"search: no trial could be fitted; the last: {journal.trials[-1].failed}")


def _answer(bench: Bench, journal: SearchJournal, search: Search) -> list[Trial]:
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
    kept = [one for one in ranked if not broken(recipe, journal, one.number)]
    if kept:
        return kept[0]
    nearest = min(ranked, key=lambda one: len(broken(recipe, journal, one.number).split(";")))
    raise GuardError(
        f"search: none of {len(ranked)} finalists meets the guard on the {SPLIT}; trial "
        f"{nearest.number}: {broken(recipe, journal, nearest.number)}"
    )
