"""The options that commands share, and what they mean."""

from collections.abc import Callable
from typing import Any

import click
from click.shell_completion import CompletionItem

__all__ = [
    "beside_options",
    "complete_recipe",
    "layers_of",
    "listed",
    "llama_cpp_option",
    "recipe_options",
    "trust_option",
]


def complete_recipe(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Files, and the names of shipped recipes."""
    from bake.recipe import shipped_recipes

    # Files first: the shell's list of them replaces what came before.
    return [CompletionItem(incomplete, type="file")] + [
        CompletionItem(one.name, help=one.description)
        for one in shipped_recipes()
        if one.name.startswith(incomplete)
    ]


def recipe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--recipe`, `--model` and `--set`."""
    options = (
        click.option(
            "--recipe",
            metavar="FILE|NAME",
            shell_complete=complete_recipe,
            help="A recipe file, or a shipped recipe.",
        ),
        click.option(
            "--model", metavar="ID|DIR", help="A Hub id or folder, in place of the recipe's."
        ),
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


def beside_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Files of other commands, as `bake.evidence.Beside` has them."""
    options = (
        click.option(
            "--geometry", metavar="FILE", help="A JSON of `bake geometry`: trades and cosines."
        ),
        click.option(
            "--selection",
            metavar="FILE",
            help="A JSON of `bake select`, or directions of `bake fit`.",
        ),
        click.option("--evaluation", metavar="FILE", help="A JSON of `bake eval` of this folder."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def trust_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--trust-remote-code`."""
    return click.option(
        "--trust-remote-code",
        "trusted",
        is_flag=True,
        help="Confirm the recipe's trust_remote_code: the tokenizer's own code runs.",
    )(function)


def llama_cpp_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--llama-cpp`."""
    return click.option(
        "--llama-cpp",
        metavar="DIR",
        help="A llama.cpp tree, in place of the fetched one, to convert with.",
    )(function)


def layers_of(text: str | None) -> tuple[int, ...] | None:
    """The layers that `--layers` names."""
    from pydantic import TypeAdapter, ValidationError

    from bake.recipe.values import Layers

    if text is None:
        return None
    try:
        given = int(text) if text.isdecimal() else text
        found: tuple[int, ...] = TypeAdapter(Layers).validate_python(given)
    except ValidationError as error:
        raise click.UsageError('--layers: expected a range like "8-24"') from error
    return found


def listed(text: str | None) -> tuple[str, ...]:
    """The names of a list with commas."""
    return tuple(one.strip() for one in (text or "").split(",") if one.strip())
