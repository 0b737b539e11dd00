"""What `bake eval` wrote; `bake.evaluation.result` has the values that it was made of."""

from pathlib import Path
from typing import Literal

from bake.errors import InputError
from bake.evaluate import Rate
from bake.evaluation.drift import Sequences, Text
from bake.evaluation.facts import Facts
from bake.evaluation.quality import Quality
from bake.evidence.reading import Read, json_of, parsed
from bake.manifest import NAME, file_hash

__all__ = ["Evaluation", "read_evaluation"]


class Side(Read):
    """The answers of one model to one set."""

    refusals: Rate
    words: float
    repeated: float
    broken: int


class Changed(Read):
    """McNemar's p of what changed."""

    p: float


class Asked(Read):
    """A set, or one of its languages."""

    set: str
    language: str
    thinking: bool | None
    before: Side | None
    after: Side
    paired: Changed | None


class Checked(Read):
    """The facts of a set."""

    set: str
    thinking: bool | None
    before: Facts | None
    after: Facts
    p: float


class Weighed(Read):
    """The quality of a set's answers."""

    set: str
    before: Quality | None
    after: Quality


class Metric(Read):
    """A metric of the harness and its standard error."""

    value: float
    stderr: float | None


class Metrics(Read):
    """A metric of both models."""

    before: Metric | None
    after: Metric


class Judge(Read):
    """Who judged."""

    kind: Literal["keyword", "chat", "local"]
    model: str | None


class Subject(Read):
    """Who answered, and where."""

    name: str
    runtime: str


class Evaluation(Read):
    """The file; `bake` is the hash of the manifest of what was evaluated."""

    format: Literal["bake.evaluation"]
    version: Literal[1]
    bake: str | None
    model: Subject
    base: Subject | None
    judge: Judge
    answer_tokens: int
    sets: list[Asked]
    facts: list[Checked]
    quality: list[Weighed]
    divergence: Sequences | None
    perplexity: Text | None
    missing: list[str]
    capability: dict[str, dict[str, Metrics]]


def read_evaluation(path: Path, folder: Path) -> Evaluation:
    """What `bake eval` found of a baked folder; raises InputError where it is of another one."""
    found = parsed(Evaluation, json_of(path, "bake eval"), path, "run `bake eval` again")
    if found.bake != file_hash(folder / NAME):
        raise InputError(
            f"{path}: bake: is of another folder than {folder}; run `bake eval {folder}` again"
        )
    return found
