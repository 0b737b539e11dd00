"""The manifest of a bake as values, read back by what comes after it: card, push, reproduction."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from bake.base_card import BaseCard
from bake.errors import ManifestError
from bake.evaluate import Rate, broken
from bake.manifest import NAME, read_manifest
from bake.recipe import LoadedRecipe, restore_recipe

__all__ = ["Evidence", "Parity"]

Rates = dict[str, dict[str, Rate]]


@dataclass(frozen=True)
class Parity:
    """The figures of `verify.Divergence` that a card shows."""

    lost_share: float
    largest: float
    largest_effect: float
    positions: int


class _Refusals(BaseModel):
    before: Rates
    after: Rates


class _Measured(BaseModel):
    refusals: _Refusals
    parity: dict[str, Parity]


class _Recipe(BaseModel):
    text: str
    source: str
    overrides: list[str]


class _Manifest(BaseModel):
    name: str
    recipe: _Recipe
    versions: dict[str, str]
    inputs: dict[str, str]
    prompts: dict[str, dict[str, str]]
    base: BaseCard
    measured: _Measured


@dataclass(frozen=True)
class Evidence:
    """A bake's recipe, its base, and refusals by runtime and role before and after.

    `content` is the whole manifest; its `outputs` are the SHA-256 of the files by their paths.
    """

    loaded: LoadedRecipe
    base: BaseCard
    before: Mapping[str, Mapping[str, Rate]]
    after: Mapping[str, Mapping[str, Rate]]
    parity: Mapping[str, Parity]
    content: Mapping[str, Any]

    @classmethod
    def of(cls, content: Mapping[str, Any], loaded: LoadedRecipe | None, place: str) -> "Evidence":
        """A manifest's content; the recipe is read from it where it is not at hand.

        `place` is where the manifest stands. Raises ManifestError, which names the key, for one
        that this bake did not write, and RecipeError for a recipe that it reads no more.
        """
        try:
            found = _Manifest.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            raise ManifestError(
                f"{place}: {key}: {first['msg'].lower()}; bake the recipe again"
            ) from error
        refusals, stated = found.measured.refusals, found.recipe
        if loaded is None:
            loaded = restore_recipe(stated.text, stated.source, stated.overrides, place)
        return cls(
            loaded, found.base, refusals.before, refusals.after, found.measured.parity, content
        )

    @classmethod
    def read(cls, folder: Path) -> "Evidence":
        """The manifest of a baked folder."""
        return cls.of(read_manifest(folder), None, str(folder / NAME))

    def broken(self) -> list[str]:
        """Every way in which the figures break the guard that the recipe states, a line each."""
        return broken(self.loaded.recipe.guard, self.before, self.after)
