"""The evaluation of what is baked, or not yet."""

from typing import Literal

import click

from bake.commands.options import listed, recipe_options
from bake.commands.root import cli, say

__all__ = ["eval_command"]


@cli.command("eval")
@click.argument("folder", metavar="[DIR]", required=False)
@recipe_options
@click.option("--base", metavar="ID|DIR|GGUF", help="What to compare with.")
@click.option("--server", metavar="URL", help="An OpenAI-compatible server that has --model.")
@click.option("--key", metavar="VARIABLE", help="The environment variable with its API key.")
@click.option(
    "--runtime",
    type=click.Choice(["transformers", "llama.cpp"]),
    help="Without it a .gguf runs in llama.cpp, all else in transformers.",
)
@click.option(
    "--sets",
    metavar="SET,...",
    multiple=True,
    help="Roles, built-in sets or files, in place of all.",
)
@click.option("--limit", type=click.IntRange(1), help="Prompts at most of each set and language.")
@click.option(
    "--tokens",
    type=click.IntRange(1, 65536),
    default=128,
    show_default=True,
    help="Tokens of an answer at most.",
)
@click.option(
    "--thinking",
    type=click.Choice(["on", "off"]),
    multiple=True,
    help="Set the chat template's enable_thinking; give both to compare.",
)
@click.option("--tasks", metavar="TASK,...", help="Tasks of lm-eval, as in mmlu,gsm8k.")
@click.option("--task-limit", type=click.IntRange(1), help="Documents at most of each task.")
@click.option("--task-path", metavar="DIR", help="A folder with tasks of your own.")
@click.option("--fresh", is_flag=True, help="Ask again for answers that are cached.")
@click.option("--output", metavar="FILE", help="A JSON file for the evidence.")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
def eval_command(
    folder: str | None,
    recipe: str | None,
    model: str | None,
    overrides: tuple[str, ...],
    base: str | None,
    server: str | None,
    key: str | None,
    runtime: Literal["transformers", "llama.cpp"] | None,
    sets: tuple[str, ...],
    limit: int | None,
    tokens: int,
    thinking: tuple[str, ...],
    tasks: str | None,
    task_limit: int | None,
    task_path: str | None,
    fresh: bool,
    output: str | None,
    overwrite: bool,
) -> None:
    r"""Evaluate a baked folder beside its base, two models, a server, or a recipe's hooks.

    \b
    bake eval political-open
    bake eval --base demo --model other.gguf
    bake eval --server http://localhost:8000/v1 --model name
    bake eval --recipe political-open.yaml
    """
    from pathlib import Path

    from bake.evaluation.opened import Named
    from bake.evaluation.to_file import Wanted, evaluate_to_file

    if folder and (model or server):
        raise click.UsageError("give a baked folder, or --model")
    if not (folder or model or recipe):
        raise click.UsageError("a baked folder, --model or --recipe is missing")
    if server and not model:
        raise click.UsageError("--server needs --model, the server's name for it")
    if key and not server:
        raise click.UsageError("--key is of a --server")
    if server:
        _check_url(server)
    if server and runtime:
        raise click.UsageError("--server has its own runtime; leave --runtime out")
    if (task_limit or task_path) and not tasks:
        raise click.UsageError("--task-limit and --task-path are of --tasks")
    given = Named(
        *(Path(folder) if folder else None, model, base, server, key, recipe, overrides, runtime)
    )
    if given.hooks and runtime == "llama.cpp":
        raise click.UsageError("a recipe's hooks run in transformers; give a model to llama.cpp")
    wanted = Wanted(
        *(listed(",".join(sets)), limit, tokens),
        thinking=tuple(one == "on" for one in dict.fromkeys(thinking)),
        fresh=fresh,
        tasks=listed(tasks),
        task_limit=task_limit,
        task_path=Path(task_path) if task_path else None,
    )
    path = Path(output) if output else None
    evaluate_to_file(given, wanted, path, overwrite, show=click.echo)
    if output:
        say(f"\nwritten: {output}")


def _check_url(url: str) -> None:
    from pydantic import TypeAdapter, ValidationError

    from bake.recipe.values import Url

    if "@" in url.partition("://")[2].partition("/")[0]:  # which no message may repeat
        raise click.UsageError(
            "--server: has a name or a password, and evidence is published; name the environment "
            "variable that holds the key with --key"
        )
    try:
        TypeAdapter(Url).validate_python(url)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise click.UsageError(f"--server: {reason}") from error
