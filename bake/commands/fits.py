"""Directions without a bake: fitted, chosen, mapped, converted."""

from dataclasses import replace
from typing import Literal

import click

from bake.commands.options import layers_of, recipe_options, trust_option
from bake.commands.root import cli

__all__ = [
    "directions_command",
    "fit_command",
    "geometry_command",
    "judge_command",
    "select_command",
]


@cli.command("fit")
@recipe_options
@click.option("--output", metavar="FILE", help="The file of directions to write.")
@click.option("--layers", metavar="LAYERS", help="Other layers than the edits need, as in 8-24.")
@trust_option
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
def fit_command(
    recipe: str | None,
    model: str | None,
    overrides: tuple[str, ...],
    output: str | None,
    layers: str | None,
    trusted: bool,
    overwrite: bool,
) -> None:
    """Fit a recipe's directions to a file, and print how good each is; nothing is baked."""
    from pathlib import Path

    from bake.fitting import fit_to_file
    from bake.recipe import load_recipe

    if not recipe or not output:
        raise click.UsageError("--recipe and --output are needed")
    if Path(output).suffix not in (".safetensors", ".gguf"):
        raise click.UsageError("--output: directions are written to .safetensors or .gguf")
    chosen = layers_of(layers)
    loaded = load_recipe(recipe, overrides=overrides, model=model)
    fit_to_file(loaded, Path(output), chosen, overwrite, show=click.echo, trusted=trusted)


@cli.command("select")
@recipe_options
@click.option("--output", metavar="FILE", help="The JSON file to write.")
@click.option("--layers", metavar="LAYERS", help="Other layers than the edits need, as in 8-24.")
@click.option(
    "--site",
    "sites",
    type=click.Choice(["mid", "out"]),
    multiple=True,
    default=["out"],
    show_default=True,
    help="After the attention, or after the block; repeat it.",
)
@click.option(
    "--tokens",
    type=click.IntRange(1, 512),
    default=1,
    show_default=True,
    help="How many of the prompt's last tokens to try.",
)
@trust_option
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
def select_command(
    recipe: str | None,
    model: str | None,
    overrides: tuple[str, ...],
    output: str | None,
    layers: str | None,
    sites: tuple[Literal["mid", "out"], ...],
    tokens: int,
    trusted: bool,
    overwrite: bool,
) -> None:
    """Choose a direction's site, layer and token by its figures; no text is written for it."""
    from pathlib import Path

    from bake.fitting import select_to_file
    from bake.recipe import load_recipe

    if not recipe or not output:
        raise click.UsageError("--recipe and --output are needed")
    chosen = layers_of(layers)
    loaded = load_recipe(recipe, overrides=overrides, model=model)
    select_to_file(
        *(loaded, Path(output), chosen, sites, tokens, overwrite), show=click.echo, trusted=trusted
    )


@cli.command("judge")
@click.argument("prompts", metavar="SET")
@recipe_options
@click.option("--column", default="text", show_default=True, help="The column of the prompts.")
@click.option("--answer", default="answer", show_default=True, help="The column of the answers.")
@click.option("--limit", type=click.IntRange(1), help="Prompts at most.")
@click.option("--output", metavar="FILE", help="A .jsonl to write, a line an answer.")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
def judge_command(
    prompts: str,
    recipe: str | None,
    model: str | None,
    overrides: tuple[str, ...],
    column: str,
    answer: str,
    limit: int | None,
    output: str | None,
    overwrite: bool,
) -> None:
    """Judge answers to prompts with a recipe's judge, and count the verdicts.

    SET is a built-in set or a file, as in a recipe. Where no prompt has an answer, the recipe's
    model answers.
    """
    from pathlib import Path

    from bake.judge.choice import find_judge
    from bake.judge.sets import counts, judged_set, write_judged
    from bake.prompts import Place, load_prompts
    from bake.recipe import load_recipe
    from bake.staging import check_file

    if not recipe:
        raise click.UsageError("--recipe is missing")
    if prompts.startswith("hub:"):
        raise click.UsageError(
            "a Hub dataset needs its commit; name it in a recipe, or give a file"
        )
    if output:
        check_file(Path(output), overwrite)
    loaded = load_recipe(recipe, overrides=overrides, model=model).recipe
    every = load_prompts(prompts, language="any", place=Place(column))
    found, own = judged_set(loaded, every, find_judge(loaded.judge), answer, limit)
    click.echo(counts(found))
    if output:
        # As a bake does: of what must stay refused the verdicts, not what was said.
        protected = {one.set for one in loaded.prompts.protected.sets}
        told = not (own and prompts in protected)
        write_judged(Path(output), found, told, overwrite)
        click.echo(f"\nwritten: {output}")


@cli.command("geometry")
@recipe_options
@click.option("--output", metavar="FILE", help="The JSON file to write.")
@click.option("--kind", "kinds", metavar="SET", multiple=True, help="A kind of refusal; repeat it.")
@click.option("--layer", type=click.IntRange(0, 999), help="The block, in place of the edits'.")
@click.option(
    "--strength", "strengths", type=float, multiple=True, help="A strength, in gaps; repeat it."
)
@click.option(
    "--limit", type=click.IntRange(1), default=16, show_default=True, help="Prompts of each role."
)
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
def geometry_command(
    recipe: str | None,
    model: str | None,
    overrides: tuple[str, ...],
    output: str | None,
    kinds: tuple[str, ...],
    layer: int | None,
    strengths: tuple[float, ...],
    limit: int,
    overwrite: bool,
) -> None:
    """Map the directions of eleven kinds of refusal, and what steering along each trades."""
    from pathlib import Path

    from bake.geometry import Question, geometry_to_file, table
    from bake.recipe import load_recipe

    if not recipe or not output:
        raise click.UsageError("--recipe and --output are needed")
    asked = Question(layer=layer, limit=limit)
    asked = replace(asked, kinds=kinds or asked.kinds, strengths=strengths or asked.strengths)
    loaded = load_recipe(recipe, overrides=overrides, model=model)
    found = geometry_to_file(loaded, asked, Path(output), overwrite)
    click.echo(f"{table(found)}\n\nwritten: {output}")


@cli.command("directions")
@click.argument("file", metavar="FILE")
@click.option(
    "--layer", type=click.IntRange(0, 999), help="The layer of a file with one bare vector."
)
@click.option("--first", is_flag=True, help="Keep the first of several directions of a layer.")
@click.option("--output", metavar="FILE", help="Convert to .safetensors, or .gguf for llama.cpp.")
@click.option("--overwrite", is_flag=True, help="Replace the written file if it exists.")
def directions_command(
    file: str, layer: int | None, first: bool, output: str | None, overwrite: bool
) -> None:
    """Print what a file of directions holds, and convert it."""
    from pathlib import Path

    from bake.directions import Directions, Unplaced, read_directions, save_directions
    from bake.directions.files import placed

    found = read_directions(Path(file))
    if layer is not None and not isinstance(found, Unplaced):
        raise click.UsageError(f"{file} names its layers; --layer is for one bare vector")
    if layer is not None or output:
        found = placed(Path(file), found, layer)
    if first and isinstance(found, Directions):
        found = found.first()
    if isinstance(found, Directions) and output:
        save_directions(found, Path(output), overwrite)
    click.echo(found.table())
    if output:
        click.echo(f"\nwritten: {output}")
