"""Around a bake: its plan, applied later, what a killed one left, recipes and their schema."""

from functools import partial

import click

from bake.commands.options import llama_cpp_option, recipe_options, trust_option
from bake.commands.root import cli, say

__all__ = ["apply_command", "clean_command", "plan_command", "recipes_command", "schema_command"]


@cli.command("plan")
@recipe_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("--output", metavar="FILE", help="Save the plan, for `bake apply`.")
@click.option("--overwrite", is_flag=True, help="Replace the plan's file if it exists.")
def plan_command(
    recipe: str | None,
    model: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
    output: str | None,
    overwrite: bool,
) -> None:
    """Print every edit that a recipe would make, from headers alone."""
    import json
    from pathlib import Path

    from bake.prepare import prepare, saved_form
    from bake.recipe import load_recipe
    from bake.saved_plan import save_plan

    if not recipe:
        raise click.UsageError("--recipe is missing")
    loaded = load_recipe(recipe, overrides=overrides, model=model)
    ready = prepare(loaded.recipe)
    if output:
        save_plan(saved_form(loaded, ready), Path(output), overwrite)
    click.echo(json.dumps(ready.plan.as_json(), indent=2) if as_json else ready.plan.table())
    if output and not as_json:
        click.echo(f"\nwritten: {output}")


@cli.command("apply")
@click.argument("plan", metavar="PLAN")
@click.option("--output", metavar="DIR", help="The folder to write.")
@llama_cpp_option
@trust_option
@click.option("--overwrite", is_flag=True, help="Replace the output folder if it exists.")
def apply_command(
    plan: str, output: str | None, llama_cpp: str | None, trusted: bool, overwrite: bool
) -> None:
    """Bake a plan that `bake plan --output PLAN` saved, if it still holds."""
    from pathlib import Path

    from bake.pipeline import bake
    from bake.report import serve_lines
    from bake.saved_plan import SavedPlan

    saved = SavedPlan.open(Path(plan))
    loaded = saved.recipe(output)
    tree = Path(llama_cpp) if llama_cpp else None
    bake_planned = partial(bake, planned=saved, llama_cpp=tree, show=click.echo)
    folder = bake_planned(loaded, overwrite=overwrite, trusted=trusted)
    say(f"\nwritten: {folder}\n\n{serve_lines(loaded.recipe, folder)}")


@cli.command("clean")
@click.argument("folder", metavar="DIR")
def clean_command(folder: str) -> None:
    """Remove what a bake into DIR left beside it when it was killed; DIR stays as it is."""
    from pathlib import Path

    from bake.staging import clean

    found = clean(Path(folder))
    click.echo(f"{folder}: {'what was left is removed' if found else 'nothing was left'}")


@cli.command("recipes")
def recipes_command() -> None:
    """List the recipes that travel with bake."""
    from bake.recipe import shipped_recipes

    for shipped in shipped_recipes():
        click.echo(f"{shipped.name}.yaml  {shipped.description}")


@cli.command("schema")
def schema_command() -> None:
    """Print the JSON Schema of recipes, with which editors complete and check them."""
    import json

    from bake.recipe.json_schema import recipe_json_schema

    click.echo(json.dumps(recipe_json_schema(), indent=2, ensure_ascii=False))
