"""The search of a recipe's open keys."""

import click

from bake.commands.options import recipe_options
from bake.commands.root import cli

__all__ = ["search_command", "search_show_command"]


@cli.group("search", invoke_without_command=True)
@recipe_options
@click.option("--output", metavar="FILE", help="The recipe to write.")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
@click.pass_context
def search_command(
    context: click.Context,
    recipe: str | None,
    model: str | None,
    overrides: tuple[str, ...],
    output: str | None,
    overwrite: bool,
) -> None:
    """Search what a recipe's `search` leaves open, under its guard, and write the choice.

    A search that was interrupted goes on where it was.
    """
    from pathlib import Path

    from bake.recipe import load_recipe
    from bake.search.run import search_to_file

    if context.invoked_subcommand:
        if recipe or model or overrides or output or overwrite:
            raise click.UsageError("give the options after the subcommand")
        return
    if not recipe or not output:
        raise click.UsageError("--recipe and --output are needed")
    loaded = load_recipe(recipe, overrides=overrides, model=model)
    search_to_file(loaded, Path(output), overwrite, show=click.echo)


@search_command.command("show")
@recipe_options
def search_show_command(recipe: str | None, model: str | None, overrides: tuple[str, ...]) -> None:
    """Print what the search of a recipe has found so far, while it runs or later."""
    from bake.recipe import load_recipe
    from bake.search.run import shown

    if not recipe:
        raise click.UsageError("--recipe is missing")
    click.echo(shown(load_recipe(recipe, overrides=overrides, model=model)))
