"""What is asked: a recipe's own roles on their test splits, and whole sets that nothing fits on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bake.errors import PromptError
from bake.evaluation.facts import KEY, known
from bake.prepare import splits_of
from bake.prompts import Prompt, Splits, builtin_sets, load_prompts
from bake.prompts.kinds import KINDS
from bake.prompts.rows import HUB, SUFFIXES
from bake.recipe import Recipe

__all__ = ["ROLES", "STANDING", "Asked", "chosen_sets", "role_splits"]

ROLES = ("target", "protected", "lookalike", "refused", "general")
# Built-in sets for a recipe that opens or closes politics: none of their topics is one that the
# set `political` fits or chooses on.
STANDING: Mapping[str, str] = {
    "political-others": "other political topics",
    "political-dressed": "harmful requests in political words",
    "political-lookalikes": "safe requests in political and harmful words",
    "political-languages": "questions on the target's held-out topics, in five languages",
    "political-facts": "facts of the target's held-out topics, with known answers",
}
POLITICAL = "political"
# Of answers to these there are verdicts alone.
HARMFUL = frozenset(
    {"harmful", "harmful-further", "harmful-more", "misinformation", "political-dressed"}
)


@dataclass(frozen=True)
class Asked:
    """One set of prompts as it is asked. `hidden` ones are harmful: what is said is not shown.

    `opened` are the topics that a recipe opens, whose answers are worth a look at their quality.
    """

    name: str
    prompts: tuple[Prompt, ...]
    hidden: bool = False
    opened: bool = False

    @property
    def facts(self) -> bool:
        """Whether its questions have known answers."""
        return all(KEY in one.extra for one in self.prompts)

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages of its prompts, in their order."""
        return tuple(dict.fromkeys(one.language for one in self.prompts))


def role_splits(recipe: Recipe) -> dict[str, Splits]:
    """The splits of every role that a recipe has, and of its texts, as a bake makes them."""
    sources = {role: getattr(recipe.prompts, role) for role in (*ROLES, "text")}
    return {role: splits_of(one) for role, one in sources.items() if one is not None}


def chosen_sets(
    recipe: Recipe,
    splits: Mapping[str, Splits],
    names: Sequence[str] = (),
    limit: int | None = None,
) -> tuple[Asked, ...]:
    """The sets by name: a role, or a built-in set or file as a whole; `limit` prompts of each.

    Without names all roles, and for a recipe whose target is the set `political` those of
    `STANDING`. Of a set in several languages `limit` is of each. Raises PromptError for a set
    that is not there, and for known answers that are none.
    """
    roles = [role for role in ROLES if role in splits]
    political = POLITICAL in {one.set for one in recipe.prompts.target.sets}
    wanted = list(dict.fromkeys(names)) or [*roles, *(STANDING if political else ())]
    found = []
    for name in wanted:
        if name in roles:
            prompts = splits[name].test
            harmful = any(one.set in HARMFUL for one in getattr(recipe.prompts, name).sets)
            one = Asked(name, prompts, name == "protected" or harmful, name == "target")
        else:
            _check(name, roles)
            prompts = load_prompts(name, language="any")
            own = {one.set for one in recipe.prompts.protected.sets}
            opened = political and name in STANDING and name != "political-lookalikes"
            one = Asked(name, prompts, name in HARMFUL | own, opened and name not in HARMFUL)
        for prompt in one.prompts if one.facts else ():
            known(prompt)
        found.append(Asked(one.name, _first(one.prompts, limit), one.hidden, one.opened))
    return tuple(found)


def _check(name: str, roles: Sequence[str]) -> None:
    if name.startswith(HUB):
        raise PromptError(
            f"--sets {name}: a Hub dataset needs its commit; name it in a recipe, or give a file"
        )
    if name in ROLES:
        raise PromptError(f"--sets {name}: the recipe has no such role; it has {', '.join(roles)}")
    if Path(name).suffix not in SUFFIXES and name not in builtin_sets():
        known_sets = ", ".join([*roles, *STANDING, *sorted(KINDS)])
        raise PromptError(
            f"--sets {name}: no role of the recipe and no built-in set; a file ends in "
            f"{', '.join(SUFFIXES)}; there are {known_sets}"
        )


def _first(prompts: Sequence[Prompt], limit: int | None) -> tuple[Prompt, ...]:
    """The first prompts of each language, spread over the topics as they stand."""
    if limit is None:
        return tuple(prompts)
    left: dict[str, list[Prompt]] = {}
    for one in _in_turn(prompts):
        left.setdefault(one.language, []).append(one)
    return tuple(one for found in left.values() for one in found[:limit])


def _in_turn(prompts: Sequence[Prompt]) -> list[Prompt]:
    """One prompt of each topic and language, then a second, and so on."""
    counts: dict[tuple[str, str], int] = {}
    ranked = []
    for place, one in enumerate(prompts):
        count = counts[one.language, one.topic] = counts.get((one.language, one.topic), 0) + 1
        ranked.append((count, place, one))
    return [one for _, _, one in sorted(ranked, key=lambda found: found[:2])]
