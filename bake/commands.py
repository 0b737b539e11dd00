"""The command line: thin commands over the package, and the one boundary for errors."""

import os
import sys
from collections.abc import Callable
from typing import Any

import click

from bake import __version__
from bake.errors import BakeError, RecipeError

__all__ = ["cli", "main"]


class _Recipes(click.Group):
    """`bake --recipe FILE` bakes; everything else is a subcommand."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl(
                [
                    ("0", "done"),
                    ("1", "bad input"),
                    ("2", "usage"),
                    ("3", "guard: a protected behaviour moved"),
                    ("4", "verification: what was written is not what was planned"),
                    ("130", "interrupted"),
                ]
            )


def _recipe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.option("--recipe", metavar="FILE|NAME", help="A recipe file, or a shipped recipe."),
        click.option(
            "--model", metavar="ID|DIR", help="A Hub id or folder, in place of the recipe's."
        ),
        click.option("--output", metavar="DIR", help="The folder to write."),
        click.option(
            "--set",
            "overrides",
            metavar="KEY=VALUE",
            multiple=True,
            help="Override a value of the recipe, as in edits.0.strength=-3.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.group(cls=_Recipes, invoke_without_command=True)
@_recipe_options
@click.option("--overwrite", is_flag=True, help="Replace the output folder if it exists.")
@click.version_option(__version__, prog_name="bake")
@click.pass_context
def cli(
    context: click.Context,
    recipe: str | None,
    model: str | None,
    output: str | None,
    overrides: tuple[str, ...],
    overwrite: bool,
) -> None:
    r"""Fold steering into the weights of a language model, and prove it.

    \b
    bake --recipe political-open.yaml
    """
    if context.invoked_subcommand:
        if recipe or model or output or overrides or overwrite:
            raise click.UsageError("give the options of a recipe after the subcommand")
        return
    if not recipe:
        click.echo(context.get_help())
        return
    from bake.pipeline import bake
    from bake.recipe import load_recipe
    from bake.report import serve_lines

    loaded = load_recipe(recipe, overrides=overrides, model=model, output=output)
    folder = bake(loaded, overwrite=overwrite, show=click.echo)
    click.echo(f"\nwritten: {folder}\n\n{serve_lines(loaded.recipe, folder)}")


@cli.command("plan")
@_recipe_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan_command(
    recipe: str | None,
    model: str | None,
    output: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Print every edit that a recipe would make, from headers alone."""
    import json

    from bake.pipeline import prepare
    from bake.recipe import load_recipe

    if not recipe:
        raise click.UsageError("--recipe is missing")
    loaded = load_recipe(recipe, overrides=overrides, model=model, output=output)
    plan = prepare(loaded.recipe).plan
    click.echo(json.dumps(plan.as_json(), indent=2) if as_json else plan.table())


@cli.command("recipes")
def recipes_command() -> None:
    """List the recipes that travel with bake."""
    from bake.recipe import shipped_recipes

    for shipped in shipped_recipes():
        click.echo(f"{shipped.name}.yaml  {shipped.description}")


def main() -> None:
    """Run the command line; every expected error becomes one message and its exit code."""
    # Threads that spin while they wait starve each other on shared cores; this must be
    # set before torch or llama.cpp start theirs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        status = cli.main(standalone_mode=False)
    except BakeError as error:
        # A recipe's mistakes are lines of `file:line:column: ...`, as editors read them.
        prefix = "" if isinstance(error, RecipeError) else "bake: "
        click.echo(f"{prefix}{error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("bake: interrupted", err=True)
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)
