"""The chosen trial as a plain recipe."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from bake.errors import VerificationError
from bake.recipe import Recipe, load_recipe
from bake.search.space import plain_values
from bake.staging import staged_file

__all__ = ["write_recipe"]


def write_recipe(recipe: Recipe, about: str, path: Path, overwrite: bool) -> None:
    """Write a recipe as YAML under lines of comment; what was not set in it keeps its default.

    Raises VerificationError where the file does not load as the same recipe.
    """
    comment = "".join(f"# {line}\n" for line in about.splitlines())
    values = _short(plain_values(recipe))
    body = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    with staged_file(path, overwrite) as staging:
        staging.write_text(comment + body, encoding="utf-8")
        if load_recipe(str(staging)).recipe != recipe:
            raise VerificationError(f"{path}: does not load as it was meant; this is a bug of bake")


def _short(values: dict[str, Any]) -> dict[str, Any]:
    """Blocks that follow each other as a range."""
    for edit in values["edits"]:
        layers = edit.get("layers")
        if layers and len(layers) > 1 and all(b - a == 1 for a, b in pairwise(layers)):
            edit["layers"] = f"{layers[0]}-{layers[-1]}"
    return values
