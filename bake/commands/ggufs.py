"""GGUFs of a checkpoint, and Ollama."""

import click

from bake.commands.options import llama_cpp_option
from bake.commands.root import cli

__all__ = ["convert_command", "ollama_command"]


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
@llama_cpp_option
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
    from bake.recipe.errors import explain

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
