"""A bake by its manifest: what the card, a push and a reproduction start from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake.errors import ManifestError
from bake.evaluate import broken, unbreakable
from bake.evidence.manifest import Manifest
from bake.evidence.reading import parsed
from bake.manifest import NAME, read_manifest
from bake.recipe import LoadedRecipe, restore_recipe

__all__ = ["Evidence"]


@dataclass(frozen=True)
class Evidence:
    """A bake's manifest, its recipe, and the whole `content` of the file."""

    manifest: Manifest
    loaded: LoadedRecipe
    content: Mapping[str, Any]

    @classmethod
    def of(cls, content: Mapping[str, Any], loaded: LoadedRecipe | None, place: str) -> "Evidence":
        """A manifest's content; the recipe is read from it where it is not at hand.

        `place` is where the manifest stands. Raises ManifestError, which names the key, for one
        that this bake did not write, and RecipeError for a recipe that it reads no more.
        """
        found = parsed(Manifest, content, place, failure=ManifestError)
        stated = found.recipe
        if loaded is None:
            loaded = restore_recipe(stated.text, stated.source, stated.overrides, place)
        return cls(found, loaded, content)

    @classmethod
    def read(cls, folder: Path) -> "Evidence":
        """The manifest of a baked folder."""
        return cls.of(read_manifest(folder), None, str(folder / NAME))

    def broken(self) -> list[str]:
        """Every way in which the figures break the guard that the recipe states, a line each."""
        found = self.manifest
        return broken(self.loaded.recipe.guard, found.before, found.after, found.measured.drift)

    def unbreakable(self) -> list[str]:
        """The limits of the guard that say nothing of this base, a line each."""
        return unbreakable(self.loaded.recipe.guard, self.manifest.before)
