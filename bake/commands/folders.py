"""What is done with a baked folder: its report, its proof, its publication."""

from typing import TYPE_CHECKING

import click

from bake.commands.options import beside_options, llama_cpp_option
from bake.commands.root import cli

if TYPE_CHECKING:
    from bake.evidence import Beside

__all__ = ["push_command", "report_command", "reproduce_command", "verify_command"]


@cli.command("report")
@click.argument("folder", metavar="DIR")
@click.option("--output", metavar="FILE", help="The HTML file to write.")
@beside_options
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
    beside = _beside(geometry, selection, evaluation)
    drawn = Path(figures) if figures else None
    report_to_file(Path(folder), Path(output), beside, drawn, overwrite)
    click.echo(f"written: {output}" + (f", {figures}" if figures else ""))


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
@llama_cpp_option
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


@cli.command("push")
@click.argument("folder", metavar="DIR")
@click.option("--repo-id", metavar="OWNER/NAME", required=True, help="The repository of the Hub.")
@click.option("--public", is_flag=True, help="Make new repositories public, not private.")
@click.option("--update", is_flag=True, help="Replace what an existing repository holds.")
@click.option("--license", "licence", metavar="ID", help="The base's licence, if it names none.")
@beside_options
@click.option("--dry-run", is_flag=True, help="List every file and ask the Hub nothing.")
def push_command(
    folder: str,
    repo_id: str,
    public: bool,
    update: bool,
    licence: str | None,
    geometry: str | None,
    selection: str | None,
    evaluation: str | None,
    dry_run: bool,
) -> None:
    """Publish a baked folder: checkpoint, GGUF (NAME-GGUF) and LoRA (NAME-LoRA)."""
    from pathlib import Path

    from bake.hub import prepare_push

    push = prepare_push(
        *(Path(folder), repo_id),
        public=public,
        update=update,
        licence=licence,
        beside=_beside(geometry, selection, evaluation),
    )
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


def _beside(*names: str | None) -> "Beside":
    from pathlib import Path

    from bake.evidence import Beside

    return Beside(*(Path(one) if one else None for one in names))
