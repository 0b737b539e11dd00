"""The documentation's pages that are made from the code have all of it."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from bake.archs import ARCHS
from bake.recipe.json_schema import recipe_json_schema
from bake.recipe.schema import Recipe

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def generate() -> dict[str, Callable[..., str]]:
    return runpy.run_path(str(ROOT / "docs" / "generate.py"), run_name="generate")


def models(kind: type[BaseModel]) -> set[type[BaseModel]]:
    """Every section below one of a recipe."""
    found = {kind}
    for field in kind.model_fields.values():
        for one in parts(field.annotation):
            found |= models(one)
    return found


def parts(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [one for inner in getattr(annotation, "__args__", ()) for one in parts(inner)]


def test_the_recipe_reference_has_every_key_with_its_meaning(
    generate: dict[str, Callable[..., str]],
) -> None:
    page = generate["recipe_page"](recipe_json_schema())
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE))
    sections["Recipe"] = page.partition("\n## ")[0]
    assert {"Gate", "Guard", "Search", "GGUFExport"} <= {one.__name__ for one in models(Recipe)}
    for model in models(Recipe):
        for key, field in model.model_fields.items():
            (row,) = re.findall(
                rf"^\| `{field.alias or key}` \|.*$", sections[model.__name__], re.M
            )
            assert not row.endswith("|  |"), f"{model.__name__}.{key} has no description"
    assert "| `seed` | whole number at least 0 at most 4294967295 | `0` |" in page
    for name in re.findall(r"\]\(#(\w+)\)", page):
        assert name in {one.lower() for one in sections}


def test_every_architecture_has_its_writers(generate: dict[str, Callable[..., str]]) -> None:
    page = generate["architecture_page"](ARCHS.values())
    for name, row in ARCHS.items():
        (line,) = re.findall(rf"^\| `{name}` \|.*$", page, re.MULTILINE)
        for branch in row.branches:
            assert all(f"`{one.module}`" in line for one in branch.writers)


def test_links_of_the_root_lead_to_pages(generate: dict[str, Callable[..., str]]) -> None:
    page = generate["moved"]("[a](docs/fit.md#x) [b](CONTRIBUTING.md) [c](https://x.org/y.md)")
    assert page == "[a](fit.md#x) [b](contributing.md) [c](https://x.org/y.md)"
