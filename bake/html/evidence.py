"""What a report is drawn from: files that bake wrote, checked as they are read.

The folder has `bake.json` and `answers.jsonl`; a map of `bake geometry`, a choice of
`bake select` and directions of `bake fit` may stand beside it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bake.directions import read_directions
from bake.directions.value import FIGURES, Directions
from bake.errors import DirectionsError, InputError, ManifestError
from bake.evaluate import Paired, Rate
from bake.evidence import Converted, Served
from bake.manifest import NAME, file_hash, read_manifest

__all__ = [
    "ANSWERS",
    "Answer",
    "Evaluation",
    "Evidence",
    "Geometry",
    "Manifest",
    "Score",
    "named_figures",
    "read_answers",
    "read_evaluation",
    "read_evidence",
    "read_geometry",
    "read_scores",
]

ANSWERS = "answers.jsonl"
PROTECTED = "protected"


class _Read(BaseModel):
    """A part of a file; what the report does not draw is passed over."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class _Rate(_Read):
    refused: int
    total: int
    unread: int = 0


class _Paired(_Read):
    opened: int
    closed: int


class _Refusals(_Read):
    before: dict[str, dict[str, _Rate]]
    after: dict[str, dict[str, _Rate]]

    @model_validator(mode="after")
    def _same_sets(self) -> Self:
        before, after = (
            {name: list(found) for name, found in when.items()}
            for when in (self.before, self.after)
        )
        if before != after:
            raise ValueError("before and after are of other runtimes or sets")
        return self


class Parity(_Read):
    """As `Divergence` has it."""

    lost_share: float
    largest: float
    largest_effect: float
    positions: int


class _Text(_Read):
    before: float
    after: float
    tokens: int
    rise: float


class _Drift(_Read):
    first_token: float | None = None
    prompts: int = 0
    text: _Text | None = None


class _Measured(_Read):
    refusals: _Refusals
    paired: dict[str, dict[str, _Paired]] = {}
    parity: dict[str, Parity]
    drift: _Drift = _Drift()


# JSON has no keys but text.
Layer = Annotated[int, Field(strict=False, ge=0)]


class _Readings(_Read):
    low: float
    high: float
    layers: dict[Layer, dict[str, list[int]]]


class _Fit(_Read):
    gaps: dict[Layer, float]
    figures: dict[Layer, dict[str, float]]
    readings: _Readings | None = None
    openings: dict[str, dict[str, float]]


class _Edit(_Read):
    operator: str
    carrier: str
    layer: int | None
    tensor: str


class _Plan(_Read):
    architecture: str
    layers: int
    width: int
    edits: list[_Edit]


class _Patched(_Read):
    tensor: str
    base_type: str | None
    written_type: str
    surviving_share: float
    noise: float
    residual: float


class _Recipe(_Read):
    text: str
    source: str
    overrides: list[str]


class _Origin(_Read):
    estimator: str = ""
    source: str = ""


class _Guard(_Read):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None]

    protected_drop: float


class _Versions(_Read):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, str]

    bake: str


class Manifest(_Read):
    """The part of `bake.json` that a report shows."""

    name: str
    recipe: _Recipe
    model: str
    seed: int
    versions: _Versions
    inputs: dict[str, str]
    prompts: dict[str, dict[str, str]]
    directions: _Origin
    plan: _Plan
    fit: _Fit
    residuals: dict[str, float]
    gguf: list[_Patched]
    conversion: Converted | None = None
    measured: _Measured
    runtimes: dict[str, Served] = {}
    guard: _Guard
    broken: list[str] = []

    def rate(self, when: Literal["before", "after"], runtime: str, role: str) -> Rate:
        """Refusals of a set in a runtime."""
        found: Mapping[str, Mapping[str, _Rate]] = getattr(self.measured.refusals, when)
        return Rate(**found[runtime][role].model_dump())

    def changed(self, runtime: str, role: str) -> Paired | None:
        """The prompts of a set that changed; None where the manifest does not say."""
        found = self.measured.paired.get(runtime, {}).get(role)
        return Paired(**found.model_dump()) if found else None


class Answer(_Read):
    """A line of `answers.jsonl`; of protected prompts there are verdicts alone."""

    runtime: str
    set: str
    topic: str
    prompt: str
    refused_before: bool | None
    refused_after: bool | None
    category_before: str = ""
    category_after: str = ""
    before: str | None = None
    after: str | None = None


class _Kind(_Read):
    meaning: str
    prompts: int
    refused: int
    by: str
    gap: float
    spread: float


class _Cosines(_Read):
    names: list[str]
    values: list[list[float]]

    @model_validator(mode="after")
    def _square(self) -> Self:
        size = len(self.names)
        if [len(row) for row in self.values] != [size] * size:
            raise ValueError(f"expected {size} rows of {size} values, one for each name")
        return self


class _Traded(_Read):
    refused: dict[str, float]
    divergence: float


class Point(_Traded):
    """What a strength trades, as docs/geometry.md has it."""

    strength: float


class _Trades(_Read):
    length: float
    prompts: dict[str, int]
    base: _Traded
    curves: dict[str, list[Point]]

    @model_validator(mode="after")
    def _same_sets(self) -> Self:
        every = [point for curve in self.curves.values() for point in curve]
        if any(point.refused.keys() != self.base.refused.keys() for point in every):
            raise ValueError("a point of a curve is of other sets than the base")
        return self


class Geometry(_Read):
    """What `bake geometry` wrote."""

    format: Literal["bake.geometry"]
    version: Literal[1]
    model: str
    recipe: str
    layer: int
    contrast: str
    kinds: dict[str, _Kind]
    controls: dict[str, str]
    cosines: _Cosines
    trades: _Trades


class _Candidate(_Read):
    site: str
    token: int
    layer: int
    figures: dict[str, float]


class _Selection(_Read):
    format: Literal["bake.selection"]
    version: Literal[1]
    model: str
    candidates: list[_Candidate]
    chosen: _Candidate | None


class _Refused(_Rate):
    interval: tuple[float, float] = Field(strict=False)


class _Side(_Read):
    refusals: _Refused
    words: float
    repeated: float
    broken: int


class _Changed(_Paired):
    p: float


class _Asked(_Read):
    set: str
    language: str
    thinking: bool | None
    before: _Side | None
    after: _Side
    paired: _Changed | None


class _Facts(_Read):
    right: int
    wrong: int
    refused: int
    unread: int


class _Checked(_Read):
    set: str
    thinking: bool | None
    before: _Facts | None
    after: _Facts
    gained: int
    lost: int
    p: float


class _Quality(_Read):
    read: int
    unread: int
    sound: int
    errors: dict[str, int]


class _Weighed(_Read):
    set: str
    before: _Quality | None
    after: _Quality


class _Divergence(_Read):
    first_token: float
    answers: float
    largest: float
    prompts: int
    positions: int


class _Metric(_Read):
    value: float
    stderr: float | None


class _Metrics(_Read):
    before: _Metric | None
    after: _Metric


class _Judge(_Read):
    kind: Literal["keyword", "chat", "local"]
    model: str | None


class _Subject(_Read):
    name: str
    runtime: str


class _Hashes(_Read):
    fingerprint: str
    prompts: list[str]


class _Disjoint(_Read):
    by_manifest: bool
    seen: dict[str, _Hashes]
    asked: dict[str, _Hashes]


class Evaluation(_Read):
    """What `bake eval` wrote; `bake` is the hash of the manifest of what was evaluated."""

    format: Literal["bake.evaluation"]
    version: Literal[1]
    bake: str | None
    model: _Subject
    base: _Subject | None
    judge: _Judge
    answer_tokens: int
    sets: list[_Asked]
    facts: list[_Checked]
    quality: list[_Weighed]
    divergence: _Divergence | None
    perplexity: _Text | None
    missing: list[str]
    capability: dict[str, dict[str, _Metrics]]
    disjoint: _Disjoint


@dataclass(frozen=True)
class Score:
    """The figures of one direction, by where it was measured; `chosen` by `bake select`."""

    series: str
    layer: int
    figures: Mapping[str, float]
    chosen: bool = False


@dataclass(frozen=True)
class Evidence:
    """Everything that a report shows.

    `scores` are of every layer that was looked at, those of the edits alone where no other file
    was given.
    """

    manifest: Manifest
    answers: tuple[Answer, ...]
    scores: tuple[Score, ...] = ()
    geometry: Geometry | None = None
    evaluation: Evaluation | None = None

    @classmethod
    def of(cls, manifest: Manifest, answers: tuple[Answer, ...]) -> "Evidence":
        """A bake alone."""
        found = manifest.fit.figures.items()
        scores = (Score("the bake's", layer, figures) for layer, figures in found)
        return cls(manifest, answers, tuple(scores))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of the edits."""
        return tuple(
            sorted({one.layer for one in self.manifest.plan.edits if one.layer is not None})
        )


Model = TypeVar("Model", bound=BaseModel)


def read_evidence(
    folder: Path,
    geometry: Path | None = None,
    scores: Path | None = None,
    evaluation: Path | None = None,
) -> Evidence:
    """Read a baked folder, and files beside it.

    Raises ManifestError where the folder has no manifest and answers of a bake, InputError or
    DirectionsError for a file that is not what it should be, or of another model.
    """
    manifest = _parsed(Manifest, read_manifest(folder), folder / NAME)
    found = Evidence.of(manifest, read_answers(folder / ANSWERS))
    if geometry:
        mapped = read_geometry(geometry)
        _check_model(geometry, mapped.model, manifest.model)
        found = replace(found, geometry=mapped)
    if scores:
        found = replace(found, scores=tuple(read_scores(scores, manifest.model)))
    if evaluation:
        found = replace(found, evaluation=read_evaluation(evaluation, folder))
    return found


def read_answers(path: Path) -> tuple[Answer, ...]:
    """The answers of a bake; what was said to protected prompts is not kept, if a line has it."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        found = [json.loads(line) for line in lines if line]
    except OSError as error:
        raise ManifestError(
            f"{path}: cannot be read: {error.strerror}; give the folder of a bake"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not JSON in every line; bake the recipe again") from error
    answers = [_parsed(Answer, one, path) for one in found]
    hidden = {"before": None, "after": None}
    return tuple(one.model_copy(update=hidden) if one.set == PROTECTED else one for one in answers)


def read_geometry(path: Path) -> Geometry:
    """A map of `bake geometry`; raises InputError where it is none."""
    return _parsed(Geometry, _json(path, "bake geometry"), path, "run `bake geometry` again")


def read_evaluation(path: Path, folder: Path) -> Evaluation:
    """What `bake eval` found of a baked folder; raises InputError where it is of another one."""
    found = _parsed(Evaluation, _json(path, "bake eval"), path, "run `bake eval` again")
    if found.bake != file_hash(folder / NAME):
        raise InputError(
            f"{path}: bake: is of another folder than {folder}; run `bake eval {folder}` again"
        )
    return found


def read_scores(path: Path, model: str) -> list[Score]:
    """The figures of `bake select`'s JSON, or of a file of directions from `bake fit`."""
    if path.suffix != ".json":
        return _scores_of(path, read_directions(path), model)
    selection = _parsed(_Selection, _json(path, "bake select"), path, "run `bake select` again")
    _check_model(path, selection.model, model)
    return [
        Score(f"{one.site}, token {one.token}", one.layer, one.figures, one == selection.chosen)
        for one in selection.candidates
    ]


def _scores_of(path: Path, directions: Any, model: str) -> list[Score]:
    if not isinstance(directions, Directions) or not directions.figures:
        raise DirectionsError(
            f"{path}: has no figures of its layers; give a .safetensors of `bake fit`, or the "
            "JSON of `bake select`"
        )
    _check_model(path, directions.origin.model, model)
    origin = directions.origin
    return [
        Score(f"{origin.estimator}, {origin.site}", layer, found)
        for layer, found in directions.figures.items()
    ]


def _check_model(path: Path, theirs: str, ours: str) -> None:
    if theirs != ours:
        raise InputError(
            f"{path}: model: is of {theirs!r} and the bake of {ours!r}; give a file of the same "
            "model"
        )


def _json(path: Path, source: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror}; give a file of `{source}`"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON; run `{source}` again") from error


def _parsed(
    kind: type[Model], found: Any, path: Path, remedy: str = "bake the recipe again"
) -> Model:
    """The part of a file that is drawn; raises an InputError that names the first wrong key."""
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        failure = ManifestError if kind in (Manifest, Answer) else InputError
        raise failure(f"{path}: {key}: {_reason(first['msg'])}; {remedy}") from error


def _reason(message: str) -> str:
    """pydantic's words as the second half of a line."""
    text = message.removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def named_figures(scores: Sequence[Score]) -> list[str]:
    """The figures that any of the scores has, in the order in which they are shown."""
    return [name for name in FIGURES if any(name in one.figures for one in scores)]
