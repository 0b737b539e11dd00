"""The JSON Schema of recipes agrees with what `load_recipe` takes and refuses."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from bake.errors import RecipeError
from bake.recipe import load_recipe, shipped_recipes
from bake.recipe.json_schema import recipe_json_schema
from tests.conftest import Run


@pytest.fixture(scope="module")
def schema() -> Iterator[Draft202012Validator]:
    found = recipe_json_schema()
    Draft202012Validator.check_schema(found)
    yield Draft202012Validator(found)


HERE = "evaluate: {runtimes: [transformers]}\n"
EDITS = HERE + "edits: [{op: gate, layers: 3-5, strength: -1}]\n"
# What both take, and what both refuse: text that a file may hold.
TAKEN = (
    EDITS,
    "name: a-name\n" + EDITS,
    HERE
    + "edits: [{op: add, layer: 3, strength: 2.5}, {op: ablate, layers: [1, 2], variant: affine}]",
    HERE + "edits: [{op: ablate, layers: 3, variant: [norm-preserving, projected]}]",
    EDITS + "prompts: {target: medical, general: {limit: 40}, lookalike: null}",
    EDITS + "prompts: {target: mine.jsonl, protected: {set: harmful, language: any}}",
    EDITS + f"prompts: {{target: {{set: 'hub:me/set', revision: {'a' * 40}}}}}",
    EDITS + "judge: {kind: chat, url: 'http://localhost:8000/v1', model: m, key: A_KEY}",
    EDITS + "export: {gguf: {base: x.gguf, edited_type: auto}, adapters: [peft]}",
    EDITS + "runtimes: [transformers]\nrevision: main\noutput: null",
)
REFUSED = (
    HERE + "name: x",
    HERE + "edits: []",
    EDITS + "edit: 1",
    HERE + "edits: [{op: gates, layers: 3, strength: 1}]",
    HERE + "edits: [{op: gate, layers: 3}]",
    HERE + "edits: [{op: gate, layers: 3 to 5, strength: 1}]",
    HERE + "edits: [{op: gate, layers: [], strength: 1}]",
    HERE + "edits: [{op: gate, layers: [-1], strength: 1}]",
    HERE + "edits: [{op: gate, layers: 3, strength: strong}]",
    EDITS + "prompts: {target: politcal}",
    EDITS + "prompts: {target: {set: 'hub:me/set', revision: main}}",
    EDITS + "prompts: {target: {sets: political}}",
    EDITS + "guard: {protected_drop: 101}",
    EDITS + "name: a name",
    EDITS + "judge: {kind: oracle}",
    EDITS + "judge: {kind: chat, url: localhost, model: m}",
    EDITS + "seed: -1",
    EDITS + "export: {gguf: demo}",
    EDITS + "runtimes: []",
)


@pytest.mark.parametrize("one", shipped_recipes(), ids=lambda one: one.name)
def test_every_shipped_recipe_fits(schema: Draft202012Validator, one: object) -> None:
    path: Path = one.path  # type: ignore[attr-defined]
    schema.validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("text", TAKEN)
def test_what_is_taken_fits(schema: Draft202012Validator, text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    load_recipe(str(path))
    schema.validate(yaml.safe_load(text))


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_refused_does_not_fit(
    schema: Draft202012Validator, text: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError):
        load_recipe(str(path))
    assert not schema.is_valid(yaml.safe_load(text))


def test_an_editor_is_told_what_each_key_means(bake: Run) -> None:
    code, out, err = bake("schema")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found == recipe_json_schema()
    for name, one in [("Recipe", found), *found["$defs"].items()]:
        for key, field in one.get("properties", {}).items():
            # A section whose own line says the same has it there alone.
            section = found["$defs"].get(field.get("$ref", "").removeprefix("#/$defs/"), {})
            assert field.get("description") or section.get("description"), f"{name}.{key}"
