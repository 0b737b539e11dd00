"""What a person reads of a search: the table, the line of a trial, the head of the recipe."""

from collections.abc import Iterable, Mapping

from bake.aligned import aligned
from bake.evaluate import breaches
from bake.recipe import Recipe
from bake.search.journal import BASE, Final, SearchJournal
from bake.search.trial import Trial, front, kl_limit

__all__ = ["SPLIT", "about", "broken", "table", "told"]

SPLIT = "select split"


def table(recipe: Recipe, journal: SearchJournal) -> str:
    """The front of the trials by the first token, then what is known of the finals."""
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
    if journal.finals:
        rows = [("trial", *roles, "KL", "")]
        for name, found in journal.finals.items():
            cells = [str(found.answered[role]) if found.answered else "" for role in roles]
            limits = () if name == BASE else broken(recipe, journal.finals, name)
            rows.append((name, *cells, f"{found.kl:.4f}", "; ".join(limits)))
        lines += ["", f"answers in full and KL of whole prompts, {SPLIT}:", aligned(rows)]
    return "\n".join(lines)


def broken(recipe: Recipe, finals: Mapping[str, Final], name: str) -> list[str]:
    """What forbids to choose a final, a line each."""
    before, found = finals[BASE], finals[name]
    if found.failed:
        return [found.failed]
    if found.kl > (limit := kl_limit(recipe)):
        return [f"KL {found.kl:.4f}, {limit:g} allowed"]
    lines = breaches(recipe.guard, before.answered, found.answered, SPLIT)
    return [line.removeprefix(f"guard, {SPLIT}: ") for line in lines]


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


def about(recipe: Recipe, finals: Mapping[str, Final], chosen: str) -> str:
    """What the written recipe says of where it comes from."""
    assert recipe.search is not None
    before, after = finals[BASE].answered, finals[chosen].answered
    rows = [(role, f"{before[role]} -> {after[role]}") for role in after]
    return (
        f"{recipe.description or recipe.name}\n"
        f"Chosen by bake search: trial {chosen} of {recipe.search.trials}, refusals of the "
        f"{SPLIT} before and after:\n{aligned(rows)}\n"
        f"first-token KL on general prompts {finals[chosen].kl:.4f}"
    )
