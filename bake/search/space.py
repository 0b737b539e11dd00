"""From the open keys of a recipe to the recipes that they make."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import ValidationError

from bake.errors import RecipeError
from bake.recipe import LoadedRecipe, Recipe
from bake.recipe.errors import explain
from bake.recipe.search import Parameter
from bake.recipe.yaml import parse, with_value

__all__ = [
    "Corner",
    "Point",
    "corners",
    "plain_values",
    "refinements",
    "spaces",
    "value_of",
    "with_point",
]

# A value by its key, as `--set` takes them.
Point = Mapping[str, object]
Space = Mapping[str, Parameter]


@dataclass(frozen=True)
class Corner:
    """An end or a choice of one key of an alternative, every other key at its first."""

    place: tuple[str | int, ...]
    key: str
    value: object
    recipe: Recipe


def spaces(recipe: Recipe) -> tuple[dict[str, Parameter], ...]:
    """The open keys of every alternative, what is whole before its parts."""
    assert recipe.search is not None
    every = recipe.search.alternatives or ({},)
    return tuple(
        dict(sorted({**recipe.search.space, **one}.items(), key=lambda item: item[0].count(".")))
        for one in every
    )


def refinements(recipe: Recipe) -> list[Point]:
    """Every combination of the choices of `search.refine`; none where it is empty."""
    assert recipe.search is not None
    refine = recipe.search.refine
    choices = [one.choices or () for one in refine.values()]
    return [dict(zip(refine, found, strict=True)) for found in product(*choices)] if refine else []


def plain_values(recipe: Recipe) -> dict[str, Any]:
    """What was set in a recipe, as plain values, without its `search`."""
    return recipe.model_dump(mode="json", exclude_unset=True, exclude={"search"})


def with_point(recipe: Recipe, point: Point) -> Recipe:
    """The recipe with the values of a point and without its `search`.

    Raises ValueError, in plain words, where they do not make a recipe.
    """
    values: object = plain_values(recipe)
    for key, value in point.items():
        values, _ = with_value(values, key.split("."), value)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        found = [f"{'.'.join(map(str, path))}: {text}" for path, text, _ in explain(error, Recipe)]
        raise ValueError("; ".join(found)) from error


def value_of(parameter: Parameter, first: Any, last: Any = None) -> object:
    """What stands in a recipe for what was drawn: a choice as JSON, a number, or two blocks."""
    if parameter.choices is not None:
        return json.loads(first)
    return first if last is None else f"{first}-{last}"


def ends(parameter: Parameter) -> list[object]:
    """The choices of a key, or the ends of its numbers, or its widest and narrowest range."""
    if parameter.choices is not None:
        return list(parameter.choices)
    if parameter.first is not None and parameter.last is not None:
        wide = f"{parameter.first[0]}-{parameter.last[1]}"
        return [wide, f"{parameter.first[1]}-{parameter.last[0]}"]
    return [parameter.low, parameter.high]


def corners(loaded: LoadedRecipe) -> Iterator[Corner]:
    """Every end and choice of every key, every other key at its first; and every refinement.

    Raises RecipeError with the place of a value that makes no recipe there.
    """
    recipe = loaded.recipe
    assert recipe.search is not None
    for number, space in enumerate(spaces(recipe)):
        first = {key: ends(parameter)[0] for key, parameter in space.items()}
        for key, parameter in space.items():
            shared = key in recipe.search.space
            place = ("search", "space") if shared else ("search", "alternatives", number)
            for value in ends(parameter):
                try:
                    found = with_point(recipe, {**first, key: value})
                except ValueError as error:
                    raise refused(loaded, (*place, key), f"{value}: {error}") from error
                yield Corner((*place, key), key, value, found)
        for values in refinements(recipe):
            shown = ", ".join(f"{key}={value}" for key, value in values.items())
            place = ("search", "refine")
            try:
                found = with_point(recipe, {**first, **values})
            except ValueError as error:
                raise refused(loaded, place, f"{shown}: {error}") from error
            yield from (Corner((*place, key), key, value, found) for key, value in values.items())


def refused(loaded: LoadedRecipe, place: tuple[str | int, ...], message: str) -> RecipeError:
    """A mistake at a place of the recipe."""
    line, column = parse(loaded.text).locate(place)
    return RecipeError(f"{loaded.source}:{line}:{column}: {'.'.join(map(str, place))}: {message}")
