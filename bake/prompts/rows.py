"""The rows of a prompt set, whatever holds them: lines, tables, or a dataset of the Hub."""

import csv
import io
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake.cache import cache_folder
from bake.errors import PromptError

__all__ = ["FIRST", "HUB", "SUFFIXES", "Place", "read_rows"]

HUB = "hub:"
EXTRA = 'pip install -c constraints.txt -e ".[data]"'
# What holds rows in a dataset's repository, and the README that names its subsets.
PATTERNS = ["*.json", "*.jsonl", "*.csv", "*.tsv", "*.parquet", "*.txt", "*.arrow", "*.gz"]
PATTERNS += ["*.zst", "*.zip", "README.md"]

Rows = Iterator[tuple[str, Mapping[str, object]]]


@dataclass(frozen=True)
class Place:
    """Which columns hold the prompt and its topic, and which part of a Hub dataset is meant.

    `revision` is a commit, so that the same recipe reads the same prompts for ever.
    """

    column: str = "text"
    topic: str = "topic"
    revision: str | None = None
    subset: str | None = None
    split: str = "train"


FIRST = Place()
"""The columns of bake's own files."""


def read_rows(name: str, place: Place) -> Rows:
    """Every row with its origin: `text`, where there are some `topic` and `language`, and others.

    Raises PromptError, with `file:line` where a row is at fault.
    """
    if name.startswith(HUB):
        rows: Rows = _of_hub(name, place)
    else:
        path = Path(name)
        rows = READERS[path.suffix](path)
    for origin, values in rows:
        yield origin, _checked(values, place, origin)


def _checked(values: Mapping[str, object], place: Place, origin: str) -> dict[str, object]:
    """The row under bake's own names, each of them text that can be written anywhere."""
    if place.column not in values:
        known = f"; the columns are {', '.join(map(str, values))}" if values else ""
        raise PromptError(f"{origin}: the key {place.column!r} is missing{known}")
    named = {"text": place.column, "topic": place.topic, "language": "language"}
    found: dict[str, object] = {}
    for name, key in named.items():
        value = values.get(key, "unknown")
        if not isinstance(value, str) or not value.strip():
            raise PromptError(f"{origin}: {key!r} must be text that is not empty")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise PromptError(f"{origin}: {key!r} holds half of a surrogate pair")
        if key in values:
            found[name] = value
    others = {key: value for key, value in values.items() if key not in named.values()}
    return {**{key: value for key, value in others.items() if key not in named}, **found}


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise PromptError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise PromptError(f"{path}:{line}: this is not UTF-8 text") from error


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    # Not splitlines: JSON may hold U+2028 and its like unescaped.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line.strip()


def _of_text(path: Path) -> Rows:
    for origin, line in _lines(path):
        yield origin, {"text": line}


def _of_json(path: Path) -> Rows:
    for origin, line in _lines(path):
        try:
            values = json.loads(line, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise PromptError(f"{origin}: not valid JSON: {reason}") from error
        if not isinstance(values, dict):
            raise PromptError(f'{origin}: expected an object like {{"text": "..."}}')
        yield origin, values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _of_csv(path: Path) -> Rows:
    """Rows of a table with a header line; an empty cell is none."""
    rows = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    header: list[str] | None = None
    try:
        for cells in rows:
            origin = f"{path}:{rows.line_num}"
            if header is None:
                header = cells
                if len(set(header)) < len(header):
                    raise PromptError(f"{origin}: two columns have one name")
            elif cells:
                if len(cells) != len(header):
                    message = f"found {len(cells)} cells, the header has {len(header)}"
                    raise PromptError(f"{origin}: {message}")
                pairs = zip(header, cells, strict=True)
                yield origin, {key: cell for key, cell in pairs if cell}
    except csv.Error as error:
        raise PromptError(f"{path}:{rows.line_num}: not valid CSV: {error}") from error


def _of_parquet(path: Path) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise PromptError(f"{path}: parquet needs the extra `data`: {EXTRA}") from error
    try:
        table = pyarrow.parquet.read_table(path)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise PromptError(f"{path}: cannot be read: {reason}") from error
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise PromptError(f"{path}: not valid parquet: {reason}") from error
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{path}:{number}", _plain_values(row)


def _of_hub(name: str, place: Place) -> Rows:
    """Rows of a dataset at one commit, through the Hub's cache and `datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise PromptError(f"{name}: Hub datasets need the extra `data`: {EXTRA}") from error
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        folder = snapshot_download(
            name.removeprefix(HUB),
            repo_type="dataset",
            revision=place.revision,
            allow_patterns=PATTERNS,
        )
    except (HTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PromptError(
            f"{name}: the Hub gave no such dataset at revision {place.revision} ({reason}); check "
            "both, and log in for a gated one"
        ) from error
    # Bars and notes of its own would stand between bake's lines.
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        rows = datasets.load_dataset(
            folder, place.subset, split=place.split, cache_dir=str(cache_folder() / "datasets")
        )
    except (ValueError, OSError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = re.sub(r"\s+", " ", str(error.__cause__ or error))[:200]
        raise PromptError(
            f"{name}: subset {place.subset or 'default'}, split {place.split}: datasets cannot "
            f"read it: {reason}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{number}", _plain_values(row)


def _plain_values(row: Mapping[str, Any]) -> dict[str, object]:
    """The row without what is missing, and what JSON does not know as text."""
    return {
        key: value if isinstance(value, str | int | float | bool) else str(value)
        for key, value in row.items()
        if value is not None
    }


READERS: Mapping[str, Callable[[Path], Rows]] = {
    ".jsonl": _of_json,
    ".txt": _of_text,
    ".csv": _of_csv,
    ".parquet": _of_parquet,
}
SUFFIXES = tuple(READERS)
