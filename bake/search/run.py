"""A search: trials on hooks by the first token, full answers of the best, the chosen recipe."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from bake.errors import FitError, GuardError, InputError, RecipeError
from bake.progress import note, progress
from bake.recipe import LoadedRecipe, Recipe, Search
from bake.search.bench import Bench
from bake.search.draw import drawn, need_optuna
from bake.search.journal import BASE, Final, SearchJournal, journal_path
from bake.search.shown import SPLIT, about, broken, table, told
from bake.search.space import refinements, with_point
from bake.search.trial import front, kl_limit, ranked
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
        finals = _end(bench, journal, search)
        show(table(recipe, journal))
        chosen = _chosen(recipe, finals)
    found = with_point(recipe, finals[chosen].point)
    write_recipe(found, about(recipe, finals, chosen), output, overwrite)
    show(f"\nchosen: trial {chosen}\nwritten: {output}")
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


def _end(bench: Bench, journal: SearchJournal, search: Search) -> dict[str, Final]:
    """The finals by name, in their order; what the journal has is not done again.

    Trials until as many as are wanted have answered in full, then every refinement of the best.
    """
    recipe = bench.ready.recipe
    finals: dict[str, Final] = {}
    refined = refinements(recipe)
    with progress("answers in full", 1 + search.finalists + len(refined)) as update:

        def ended(name: str, found: Callable[[], Final]) -> None:
            if name not in journal.finals:
                journal.end(name, found())
            finals[name] = journal.finals[name]
            update(bool(finals[name].answered))

        ended(BASE, lambda: Final({}, 0.0, bench.answers()))
        for one in ranked(journal.trials[: search.trials], recipe.guard):
            if sum(bool(final.answered) for final in finals.values()) > search.finalists:
                break
            if one.excess["kl"] <= 0:
                ended(str(one.number), partial(bench.final, one.point))
        best = _best(recipe, finals)
        for number, values in enumerate(refined if best else (), 1):
            ended(f"{best}.{number}", partial(bench.final, {**finals[best].point, **values}))
    return finals


def _best(recipe: Recipe, finals: Mapping[str, Final]) -> str:
    """The final with the best target that breaks the least, or the one with the smaller divergence.

    Empty where none has answered.
    """
    up = recipe.guard.target_at_least is not None

    def rank(name: str) -> tuple[int, float, float]:
        target = finals[name].answered["target"].percent
        return len(broken(recipe, finals, name)), -target if up else target, finals[name].kl

    answered = (name for name, one in finals.items() if name != BASE and one.answered)
    return min(answered, key=rank, default="")


def _chosen(recipe: Recipe, finals: Mapping[str, Final]) -> str:
    """The best final. Raises GuardError with what it breaks."""
    best = _best(recipe, finals) or list(finals)[-1]
    if best == BASE:
        raise GuardError(
            f"search: no trial is within the limit of {kl_limit(recipe):g} nats; open smaller "
            "strengths"
        )
    if limits := broken(recipe, finals, best):
        raise GuardError(
            f"search: none of {len(finals) - 1} finalists meets the guard on the {SPLIT}; trial "
            f"{best}: {'; '.join(limits)}"
        )
    return best
