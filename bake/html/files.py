"""The report and its figures as files."""

import re
from pathlib import Path

from bake.errors import OutputError
from bake.html.evidence import ANSWERS, Evidence, Manifest, read_answers, read_evidence
from bake.html.figures import drawn
from bake.html.page import page
from bake.manifest import NAME
from bake.staging import check_file, check_output, staged, staged_file

__all__ = ["FIGURES", "REPORT", "report_to_file", "write_report"]

REPORT = "report.html"
FIGURES = "figures"


def report_to_file(
    folder: Path,
    output: Path,
    geometry: Path | None = None,
    scores: Path | None = None,
    figures: Path | None = None,
    evaluation: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Draw the report of a baked folder, and its figures as SVG into a folder of their own.

    `geometry` is a map of `bake geometry`, `scores` a choice of `bake select` or directions of
    `bake fit`, `evaluation` what `bake eval` wrote of the folder. Raises an InputError for a file
    that is not what it should be, OutputError for an output that exists, or that would change what
    was baked.
    """
    for path in (output, figures):
        if path and path.resolve().is_relative_to(folder.resolve()):
            raise OutputError(
                f"{path}: lies in the baked folder, whose files {NAME} has the hashes of; give "
                "another --output"
            )
    check_file(output, overwrite)
    if figures:
        check_output(figures, overwrite)
    evidence = read_evidence(folder, geometry, scores, evaluation)
    text = _bytes(page(evidence))
    if figures:
        with staged(figures, overwrite) as staging:
            _write_figures(evidence, staging)
    with staged_file(output, overwrite) as staging:
        staging.write_bytes(text)


def write_report(folder: Path, manifest: object) -> None:
    """Write the report of a folder that is being baked, from its answers and its manifest to be."""
    evidence = Evidence.of(Manifest.model_validate(manifest), read_answers(folder / ANSWERS))
    (folder / REPORT).write_bytes(_bytes(page(evidence)))
    (folder / FIGURES).mkdir()
    _write_figures(evidence, folder / FIGURES)


def _write_figures(evidence: Evidence, folder: Path) -> None:
    for kind, pictures in drawn(evidence).items():
        for name, figure in pictures.items():
            # A runtime's name, a set's or a figure's, as part of a file's.
            stem = re.sub(r"[^a-z0-9]+", "-", f"{kind}-{name}".lower()).strip("-")
            (folder / f"{stem}.svg").write_bytes(_bytes(figure.standalone()))


def _bytes(text: str) -> bytes:
    """UTF-8, in which half of a surrogate pair, that JSON can hold, has no place."""
    return text.encode("utf-8", "replace")
