"""Talking to models."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import click

from bake.commands.root import cli

__all__ = ["chat_command", "compare_command"]


def _talk_options(function: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.option(
            "--runtime",
            type=click.Choice(["transformers", "llama.cpp"]),
            help="Without it a .gguf runs in llama.cpp, all else in transformers.",
        ),
        click.option("--system", metavar="TEXT", help="The system's turn in front."),
        click.option(
            "--tokens",
            type=click.IntRange(1),
            default=256,
            show_default=True,
            help="Tokens of an answer at most.",
        ),
        click.option(
            "--context",
            type=click.IntRange(16),
            default=2048,
            show_default=True,
            help="Tokens of a conversation in llama.cpp.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@cli.command("chat")
@click.argument("model", metavar="DIR")
@_talk_options
def chat_command(
    model: str,
    runtime: Literal["transformers", "llama.cpp"] | None,
    system: str | None,
    tokens: int,
    context: int,
) -> None:
    """Talk to a model, greedily: a baked folder, a Hub id or a GGUF.

    Every line of the input is a turn, /new forgets what was said, Ctrl-D ends.
    """
    from bake.talk.chat import chat
    from bake.talk.speaker import speaker

    with speaker(model, runtime, context) as one:
        chat(one, _typed(), partial(click.echo, nl=False), tokens, system)


def _typed() -> Iterator[str]:
    """The lines of the input; on a terminal they are asked for."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo()
            return


@cli.command("compare")
@click.argument("base", metavar="BASE")
@click.argument("baked", metavar="BAKED")
@click.option("--prompt", "prompts", metavar="TEXT", multiple=True, help="A prompt; repeat it.")
@_talk_options
def compare_command(
    base: str,
    baked: str,
    prompts: tuple[str, ...],
    runtime: Literal["transformers", "llama.cpp"] | None,
    system: str | None,
    tokens: int,
    context: int,
) -> None:
    """Answer prompts with two models, side by side; both are in memory at once."""
    import shutil

    from bake.talk.chat import compare
    from bake.talk.speaker import speaker

    if not prompts:
        raise click.UsageError("--prompt is missing")
    columns = shutil.get_terminal_size((100, 24)).columns
    with speaker(base, runtime, context) as one, speaker(baked, runtime, context) as other:
        write = partial(click.echo, nl=False)
        compare((one, other), (base, baked), prompts, write, tokens, columns, system)
