"""The manifest of a bake as values, read back by what comes after it: card, push, reproduction."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ValidationError

from bake.base_card import BaseCard
from bake.errors import ManifestError
from bake.evaluate import Rate, broken
from bake.evaluation.drift import UNMEASURED, Drift
from bake.manifest import NAME, read_manifest
from bake.recipe import LoadedRecipe, restore_recipe

__all__ = ["MOVED", "Converted", "Evidence", "Parity", "Served"]

MOVED: Final = "llama.cpp, as the checkpoint is moved"
"""The parity of a GGUF whose hooked model is its base, moved by what hooks move in the checkpoint.

Under `llama.cpp` it is the base with the edits in float32, where the base is quantised.
"""

Rates = dict[str, dict[str, Rate]]


@dataclass(frozen=True)
class Parity:
    """The figures of `verify.Divergence` that a card shows."""

    lost_share: float
    largest: float
    largest_effect: float
    positions: int


class Served(BaseModel):
    """What the manifest says of a runtime; as a text, what a person reads of it."""

    status: Literal["verified", "by table", "not written"]
    lost_share: float | None = None
    version: str = ""
    trust: list[str] = []
    reads: str = ""

    def __str__(self) -> str:
        if self.lost_share is not None:
            return f"logits compared, lost share {self.lost_share:.1e}"
        if self.status == "not written":
            return f"has nothing to serve: no {self.reads} is written"
        return f"not run; by what is known of {self.version}, {'; '.join(self.trust)}"


class Converted(BaseModel):
    """How the GGUF was made of the checkpoint; as a text, what a person reads of it."""

    type: str
    outtype: str
    apart: float
    imatrix: str | None = None

    def __str__(self) -> str:
        text = (
            f"The GGUF was made of the checkpoint by llama.cpp's own converter, in {self.outtype} "
            f"(logits of the unedited one {self.apart:.2%} from the checkpoint's)"
        )
        if self.type == self.outtype:
            return f"{text}."
        weighed = ", weighed by an importance matrix" if self.imatrix else ""
        return f"{text}, and quantised by llama.cpp: {self.type}{weighed}."


class _Refusals(BaseModel):
    before: Rates
    after: Rates


class _Measured(BaseModel):
    refusals: _Refusals
    parity: dict[str, Parity]
    drift: Drift = UNMEASURED


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
    runtimes: dict[str, Served] = {}
    conversion: Converted | None = None


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
    runtimes: Mapping[str, Served]
    conversion: Converted | None
    content: Mapping[str, Any]
    drift: Drift = UNMEASURED

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
        measured = found.measured
        return cls(
            *(loaded, found.base, refusals.before, refusals.after, measured.parity),
            *(found.runtimes, found.conversion, content, measured.drift),
        )

    @classmethod
    def read(cls, folder: Path) -> "Evidence":
        """The manifest of a baked folder."""
        return cls.of(read_manifest(folder), None, str(folder / NAME))

    def broken(self) -> list[str]:
        """Every way in which the figures break the guard that the recipe states, a line each."""
        return broken(self.loaded.recipe.guard, self.before, self.after, self.drift)
