"""`bake --recipe FILE` itself, which all commands hang on."""

import os
from typing import Final

import click

from bake import __version__
from bake.commands.options import llama_cpp_option, recipe_options, trust_option

__all__ = ["cli", "say"]


# What the processes of a launch share; None is a bake.
SHARED: Final = (None, "apply", "eval", "fit", "select")


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


@click.group(cls=_Recipes, invoke_without_command=True)
@recipe_options
@click.option("--output", metavar="DIR", help="The folder to write.")
@llama_cpp_option
@trust_option
@click.option("--overwrite", is_flag=True, help="Replace the output folder if it exists.")
@click.version_option(__version__, prog_name="bake")
@click.pass_context
def cli(
    context: click.Context,
    recipe: str | None,
    model: str | None,
    output: str | None,
    overrides: tuple[str, ...],
    llama_cpp: str | None,
    trusted: bool,
    overwrite: bool,
) -> None:
    """Fold steering into the weights of a language model, and prove it.

    bake --recipe political-open.yaml
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and context.invoked_subcommand not in SHARED:
        raise click.UsageError(
            "several processes are for bakes, `bake apply`, `bake eval`, `bake fit` and `bake "
            "select`; run this without launcher"
        )
    if context.invoked_subcommand:
        if recipe or model or output or overrides or llama_cpp or trusted or overwrite:
            raise click.UsageError("give the options of a recipe after the subcommand")
        return
    if not recipe:
        click.echo(context.get_help())
        return
    from pathlib import Path

    from bake.pipeline import bake
    from bake.recipe import load_recipe
    from bake.report import serve_lines

    loaded = load_recipe(recipe, overrides=overrides, model=model, output=output)
    tree = Path(llama_cpp) if llama_cpp else None
    folder = bake(loaded, overwrite=overwrite, llama_cpp=tree, trusted=trusted, show=click.echo)
    say(f"\nwritten: {folder}\n\n{serve_lines(loaded.recipe, folder)}")


def say(text: str) -> None:
    """Print a line; of the processes of a launch one does."""
    if os.environ.get("RANK", "0") == "0":
        click.echo(text)
