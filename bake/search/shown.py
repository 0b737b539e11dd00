"""What a person reads of a search: the table, the line of a trial, the head of the recipe."""

from collections.abc import Iterable

from bake.aligned import aligned
from bake.evaluate import breaches
from bake.recipe import Recipe
from bake.search.journal import SearchJournal
from bake.search.trial import Trial, front

__all__ = ["SPLIT", "about", "broken", "table", "told"]

SPLIT = "select split"


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
    stopped = sum(bool(one.stopped) for one in trials)
    allowed = sum(one.allowed and not one.stopped for one in trials)
    lines = [
        f"first token, {len(trials)} trials ({allowed} within the limits, {stopped} stopped early, "
        f"{failed} without a fit):",
        aligned(rows),
    ]
    if journal.answered:
        rows = [("trial", *roles, "")]
        for number, found in journal.answered.items():
            cells = [str(found[role]) for role in roles]
            name = "base" if number is None else str(number)
            limits = "" if number is None else broken(recipe, journal, number)
            rows.append((name, *cells, limits))
        lines += ["", f"answers in full, {SPLIT}:", aligned(rows)]
    return "\n".join(lines)


def broken(recipe: Recipe, journal: SearchJournal, number: int) -> str:
    """What of the guard a finalist breaks; empty where nothing."""
    before, after = journal.answered[None], journal.answered[number]
    start = f"guard, {SPLIT}: "
    lines = breaches(recipe.guard, before, after, SPLIT)
    return "; ".join(line.removeprefix(start) for line in lines)


def told(one: Trial) -> str:
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


def about(recipe: Recipe, journal: SearchJournal, chosen: Trial) -> str:
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
