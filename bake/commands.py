"""The command line: thin commands over the package, and the one boundary for errors."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Final, Literal

import click
from click.shell_completion import CompletionItem

from bake import __version__
from bake.errors import BakeError, RecipeError

__all__ = ["cli", "main"]

# What a system says of a path, wherever one is touched first.
_SYSTEM = (errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG, errno.EPERM, errno.EROFS)


# What the processes of a launch share; None is a bake.
SHARED: Final = (None, "apply", "fit", "select")


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


def _complete_recipe(
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


def _recipe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.option(
            "--recipe",
            metavar="FILE|NAME",
            shell_complete=_complete_recipe,
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


def _trust_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--trust-remote-code",
        "trusted",
        is_flag=True,
        help="Confirm the recipe's trust_remote_code: the tokenizer's own code runs.",
    )(function)


def _llama_cpp_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--llama-cpp",
        metavar="DIR",
        help="A llama.cpp tree, in place of the fetched one, to convert with.",
    )(function)


@click.group(cls=_Recipes, invoke_without_command=True)
@_recipe_options
@click.option("--output", metavar="DIR", help="The folder to write.")
@_llama_cpp_option
@_trust_option
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
            "several processes are for bakes, `bake apply`, `bake fit` and `bake select`; run "
            "this without launcher"
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
    _say(f"\nwritten: {folder}\n\n{serve_lines(loaded.recipe, folder)}")


def _say(text: str) -> None:
    """Print a line; of the processes of a launch one does."""
    if os.environ.get("RANK", "0") == "0":
        click.echo(text)


@cli.command("plan")
@_recipe_options
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
@_llama_cpp_option
@_trust_option
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
    _say(f"\nwritten: {folder}\n\n{serve_lines(loaded.recipe, folder)}")


@cli.command("fit")
@_recipe_options
@click.option("--output", metavar="FILE", help="The file of directions to write.")
@click.option("--layers", metavar="LAYERS", help="Other layers than the edits need, as in 8-24.")
@_trust_option
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
    chosen = _layers(layers)
    loaded = load_recipe(recipe, overrides=overrides, model=model)
    fit_to_file(loaded, Path(output), chosen, overwrite, show=click.echo, trusted=trusted)


@cli.command("select")
@_recipe_options
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
@_trust_option
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
    chosen = _layers(layers)
    loaded = load_recipe(recipe, overrides=overrides, model=model)
    select_to_file(
        *(loaded, Path(output), chosen, sites, tokens, overwrite), show=click.echo, trusted=trusted
    )


@cli.group("search", invoke_without_command=True)
@_recipe_options
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
@_recipe_options
def search_show_command(recipe: str | None, model: str | None, overrides: tuple[str, ...]) -> None:
    """Print what the search of a recipe has found so far, while it runs or later."""
    from bake.recipe import load_recipe
    from bake.search.run import shown

    if not recipe:
        raise click.UsageError("--recipe is missing")
    click.echo(shown(load_recipe(recipe, overrides=overrides, model=model)))


def _layers(text: str | None) -> tuple[int, ...] | None:
    """The layers that `--layers` names."""
    from pydantic import TypeAdapter, ValidationError

    from bake.recipe_values import Layers

    if text is None:
        return None
    try:
        given = int(text) if text.isdecimal() else text
        found: tuple[int, ...] = TypeAdapter(Layers).validate_python(given)
    except ValidationError as error:
        raise click.UsageError('--layers: expected a range like "8-24"') from error
    return found


@cli.command("judge")
@click.argument("prompts", metavar="SET")
@_recipe_options
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
        told = not (own and prompts == loaded.prompts.protected.set)
        write_judged(Path(output), found, told, overwrite)
        click.echo(f"\nwritten: {output}")


@cli.command("eval")
@click.argument("folder", metavar="[DIR]", required=False)
@_recipe_options
@click.option("--base", metavar="ID|DIR|GGUF", help="What to compare with.")
@click.option("--server", metavar="URL", help="An OpenAI-compatible server that has --model.")
@click.option("--key", metavar="VARIABLE", help="The environment variable with its API key.")
@click.option(
    "--runtime",
    type=click.Choice(["transformers", "llama.cpp"]),
    help="Without it a .gguf runs in llama.cpp, all else in transformers.",
)
@click.option("--sets", metavar="SET,...", help="Roles, built-in sets or files, in place of all.")
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
    sets: str | None,
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
        *(_listed(sets), limit, tokens),
        thinking=tuple(one == "on" for one in dict.fromkeys(thinking)),
        fresh=fresh,
        tasks=_listed(tasks),
        task_limit=task_limit,
        task_path=Path(task_path) if task_path else None,
    )
    path = Path(output) if output else None
    evaluate_to_file(given, wanted, path, overwrite, show=click.echo)
    if output:
        click.echo(f"\nwritten: {output}")


def _check_url(url: str) -> None:
    from pydantic import TypeAdapter, ValidationError

    from bake.recipe_values import Url

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


def _listed(text: str | None) -> tuple[str, ...]:
    """The names of a list with commas."""
    return tuple(one.strip() for one in (text or "").split(",") if one.strip())


@cli.command("geometry")
@_recipe_options
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


@cli.command("convert")
@click.argument("folder", metavar="DIR")
@click.option("--type", "kind", metavar="TYPE", help="As for llama-quantize: q4_k_m, iq3_s, bf16.")
@click.option("--output", "-o", metavar="FILE", help="The GGUF to write.")
@click.option(
    "--imatrix", metavar="FILE|text", help="An importance matrix, or one of bake's texts."
)
@click.option(
    "--tensor-type", "types", metavar="NAME=TYPE", multiple=True, help="A matrix's type; repeat it."
)
@click.option("--output-tensor-type", metavar="TYPE", help="The type of output.weight.")
@click.option("--token-embedding-type", metavar="TYPE", help="The type of the token embedding.")
@click.option("--pure", is_flag=True, help="One type for all matrices.")
@click.option("--base", metavar="GGUF", help="The file whose types `--type base` takes.")
@_llama_cpp_option
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
def convert_command(
    folder: str,
    kind: str | None,
    output: str | None,
    imatrix: str | None,
    types: tuple[str, ...],
    output_tensor_type: str | None,
    token_embedding_type: str | None,
    pure: bool,
    base: str | None,
    llama_cpp: str | None,
    overwrite: bool,
) -> None:
    """Convert a checkpoint to a GGUF of any type, by llama.cpp's converter and quantiser."""
    from pathlib import Path

    from pydantic import ValidationError

    from bake.export.conversion import convert_to_file
    from bake.recipe import Conversion
    from bake.recipe_errors import explain

    if not kind or not output:
        raise click.UsageError("--type and --output are needed")
    if (kind == "base") != bool(base):
        raise click.UsageError("--type base and --base GGUF go together")
    try:
        asked = Conversion(
            type=kind,
            imatrix=imatrix,
            tensor_types=dict(_pair(one) for one in types),
            output_tensor_type=output_tensor_type,
            token_embedding_type=token_embedding_type,
            pure=pure,
        )
    except ValidationError as error:
        path, message, _ = next(explain(error, Conversion))
        raise click.UsageError(f"--{str(path[0]).replace('_', '-')}: {message}") from error
    measured = convert_to_file(
        *(Path(folder), Path(output), asked),
        llama_cpp=Path(llama_cpp) if llama_cpp else None,
        mix=Path(base) if base else None,
        overwrite=overwrite,
    )
    click.echo(f"{measured}\n\nwritten: {output}")


def _pair(given: str) -> tuple[str, str]:
    name, equals, kind = given.rpartition("=")
    if not equals or not name:
        raise click.UsageError(f"--tensor-type: expected NAME=TYPE, found {given!r}")
    return name, kind


@cli.command("report")
@click.argument("folder", metavar="DIR")
@click.option("--output", metavar="FILE", help="The HTML file to write.")
@click.option("--geometry", metavar="FILE", help="A JSON of `bake geometry`: trades and cosines.")
@click.option(
    "--selection", metavar="FILE", help="A JSON of `bake select`, or directions of `bake fit`."
)
@click.option("--evaluation", metavar="FILE", help="A JSON of `bake eval` of this folder.")
@click.option("--figures", metavar="DIR", help="A folder for the figures as SVG.")
@click.option("--overwrite", is_flag=True, help="Replace what is written if it exists.")
def report_command(
    folder: str,
    output: str | None,
    geometry: str | None,
    selection: str | None,
    evaluation: str | None,
    figures: str | None,
    overwrite: bool,
) -> None:
    """Draw a baked folder's report again, as one HTML file, with other evidence beside it."""
    from pathlib import Path

    from bake.html.files import report_to_file

    if not output:
        raise click.UsageError("--output is missing")
    given = {"geometry": geometry, "scores": selection, "figures": figures}
    given["evaluation"] = evaluation
    beside = {name: Path(one) for name, one in given.items() if one}
    report_to_file(Path(folder), Path(output), overwrite=overwrite, **beside)
    click.echo(f"written: {output}" + (f", {figures}" if figures else ""))


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


@cli.command("verify")
@click.argument("folder", metavar="DIR")
@click.option(
    "--runtime",
    "runtimes",
    type=click.Choice(["transformers", "llama.cpp", "mlx"]),
    multiple=True,
    help="Run it there beside the hooked base model; repeat it.",
)
@click.option("--base", metavar="DIR", help="Where the base is, if not where the recipe has it.")
@click.option("--base-gguf", metavar="FILE", help="Where the GGUF that was patched is.")
@_llama_cpp_option
@click.option("--server", is_flag=True, help="Ask `python -m llama_cpp.server` too.")
@click.option("--output", metavar="FILE", help="A JSON file for the findings.")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
def verify_command(
    folder: str,
    runtimes: tuple[str, ...],
    base: str | None,
    base_gguf: str | None,
    llama_cpp: str | None,
    server: bool,
    output: str | None,
    overwrite: bool,
) -> None:
    """Is every file of a baked folder as the manifest has it, and does it serve as promised?"""
    from pathlib import Path

    from bake.errors import VerificationError
    from bake.manifest import differences, read_outputs
    from bake.progress import progress
    from bake.staging import check_file

    if (base or base_gguf or llama_cpp or server or output) and not runtimes:
        raise click.UsageError(
            "--base, --base-gguf, --llama-cpp, --server and --output need a --runtime"
        )
    if server and "llama.cpp" not in runtimes:
        raise click.UsageError("--server is of --runtime llama.cpp")
    if output:
        check_file(Path(output), overwrite)
    outputs = read_outputs(Path(folder))
    written = (Path(folder, name) for name in outputs)
    size = sum(path.stat().st_size for path in written if path.is_file())
    with progress("verify", size) as update:
        broken = differences(Path(folder), outputs, update)
    if broken:
        raise VerificationError("\n".join(broken))
    click.echo(f"{folder}: {len(outputs)} files are as the bake wrote them")
    if not runtimes:
        return
    from bake.runtimes.verify import verify_runtimes, write_findings

    found = verify_runtimes(
        Path(folder),
        dict.fromkeys(runtimes),
        Path(base) if base else None,
        Path(base_gguf) if base_gguf else None,
        server,
        Path(llama_cpp) if llama_cpp else None,
    )
    click.echo("\n".join(map(str, found)))
    if output:
        write_findings(found, Path(output), overwrite)
    failed = [one for one in found if not one.passed]
    if failed:
        raise VerificationError(
            "\n".join(f"{folder}: {one.runtime}, {one.check}: {one.text}" for one in failed)
        )


@cli.command("ollama")
@click.argument("folder", metavar="DIR")
@click.option("--name", metavar="NAME", help="The model's name there, in place of the bake's.")
@click.option("--overwrite", is_flag=True, help="Replace a model of this name.")
def ollama_command(folder: str, name: str | None, overwrite: bool) -> None:
    """Give the GGUF of a baked folder to Ollama, by `ollama create`."""
    from pathlib import Path

    from bake.export.ollama import create

    made = create(Path(folder), name, overwrite)
    click.echo(f"created: {made}; run it with `ollama run {made}`")


@cli.command("push")
@click.argument("folder", metavar="DIR")
@click.option("--repo-id", metavar="OWNER/NAME", required=True, help="The repository of the Hub.")
@click.option("--public", is_flag=True, help="Make new repositories public, not private.")
@click.option("--update", is_flag=True, help="Replace what an existing repository holds.")
@click.option("--license", "licence", metavar="ID", help="The base's licence, if it names none.")
@click.option("--dry-run", is_flag=True, help="List every file and ask the Hub nothing.")
def push_command(
    folder: str, repo_id: str, public: bool, update: bool, licence: str | None, dry_run: bool
) -> None:
    """Publish a baked folder: checkpoint, GGUF (NAME-GGUF) and LoRA (NAME-LoRA)."""
    from pathlib import Path

    from bake.hub import prepare_push

    push = prepare_push(Path(folder), repo_id, public=public, update=update, licence=licence)
    if dry_run:
        click.echo(f"{push.table()}\n\ncommit: {push.message}")
    else:
        push.send(show=click.echo)


@cli.command("reproduce")
@click.argument("source", metavar="DIR|REPO")
@click.option("--revision", metavar="COMMIT", help="A commit, branch or tag of the repository.")
@click.option("--output", metavar="DIR", help="Keep the new bake there.")
def reproduce_command(source: str, revision: str | None, output: str | None) -> None:
    """Bake a folder's or a repository's manifest again, and compare hashes and figures."""
    from pathlib import Path

    from bake.errors import VerificationError
    from bake.hub import find_evidence

    evidence = find_evidence(source, revision)
    from bake.reproduce import reproduce

    found = reproduce(evidence, Path(output) if output else None)
    click.echo(found.table())
    if found.moved:
        raise VerificationError(f"{source}: {len(found.moved)} counts of refusals are not the same")


@cli.command("schema")
def schema_command() -> None:
    """Print the JSON Schema of recipes, with which editors complete and check them."""
    import json

    from bake.recipe_json import recipe_json_schema

    click.echo(json.dumps(recipe_json_schema(), indent=2, ensure_ascii=False))


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
    except OSError as error:
        if error.filename is None or error.errno not in _SYSTEM:
            raise
        click.echo(f"bake: {error.filename}: {error.strerror}; give another path", err=True)
        sys.exit(BakeError.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("bake: interrupted", err=True)
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)
