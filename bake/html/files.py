"""The report and its figures as files."""

import re
from collections.abc import Mapping
from pathlib import Path

from bake.errors import OutputError
from bake.evidence import ANSWERS, Beside, Evidence, Shown, read_answers, read_shown
from bake.html.figures import drawn
from bake.html.page import page
from bake.manifest import NAME
from bake.staging import check_file, check_output, staged, staged_file

__all__ = ["FIGURES", "REPORT", "report_as_files", "report_to_file", "write_report"]

REPORT = "report.html"
FIGURES = "figures"


def report_to_file(
    folder: Path,
    output: Path,
    beside: Beside,
    figures: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Draw the report of a baked folder, and its figures as SVG into a folder of their own.

    `beside` are files of other commands. Raises an InputError for a file that is not what it
    should be, OutputError for an output that exists, or that would change what was baked.
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
    shown = read_shown(folder, beside)
    text = _bytes(page(shown))
    if figures:
        with staged(figures, overwrite) as staging:
            for name, content in _figures(shown).items():
                (staging / name).write_bytes(content)
    with staged_file(output, overwrite) as staging:
        staging.write_bytes(text)


def write_report(folder: Path, evidence: Evidence) -> tuple[str, ...]:
    """Write the report of a folder that is being baked, from its answers and its manifest to be.

    Returns the figures' paths in the folder.
    """
    shown = Shown.of(evidence, read_answers(folder / ANSWERS))
    files = report_as_files(shown)
    (folder / FIGURES).mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return tuple(name for name in files if name != REPORT)


def report_as_files(shown: Shown) -> Mapping[str, bytes]:
    """The report and its figures, by their paths in a folder."""
    figures = {f"{FIGURES}/{name}": content for name, content in _figures(shown).items()}
    return {REPORT: _bytes(page(shown)), **figures}


def _figures(shown: Shown) -> dict[str, bytes]:
    found = {}
    for kind, pictures in drawn(shown).items():
        for name, figure in pictures.items():
            # A runtime's name, a set's or a figure's, as part of a file's.
            stem = re.sub(r"[^a-z0-9]+", "-", f"{kind}-{name}".lower()).strip("-")
            found[f"{stem}.svg"] = _bytes(figure.standalone())
    return found


def _bytes(text: str) -> bytes:
    """UTF-8, in which half of a surrogate pair, that JSON can hold, has no place."""
    return text.encode("utf-8", "replace")
