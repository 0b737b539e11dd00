"""The JSON Schema of recipes: what editors complete and check them by.

It says what each key takes. What keys say of each other only `load_recipe` checks.
"""

from typing import Any

from bake.recipe.schema import Recipe

__all__ = ["recipe_json_schema"]

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_json_schema() -> dict[str, Any]:
    """The schema of a recipe's file; its name may be left out, since the file has one."""
    found = Recipe.model_json_schema(mode="validation")
    required = [key for key in found["required"] if key != "name"]
    return {"$schema": DIALECT, **found, "required": required, "title": "A recipe of bake"}
