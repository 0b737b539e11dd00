"""How good the directions of layers are: from `bake select`, from `bake fit`, or the bake's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bake.directions import read_directions
from bake.directions.value import FIGURES, Directions
from bake.errors import DirectionsError
from bake.evidence.reading import Read, check_model, json_of, parsed

__all__ = ["Score", "named_figures", "read_scores"]


@dataclass(frozen=True)
class Score:
    """The figures of one direction, by where it was measured; `chosen` by `bake select`."""

    series: str
    layer: int
    figures: Mapping[str, float]
    chosen: bool = False


class Candidate(Read):
    """A direction that was tried."""

    site: str
    token: int
    layer: int
    figures: dict[str, float]


class Selection(Read):
    """The JSON of `bake select`."""

    format: Literal["bake.selection"]
    version: Literal[1]
    model: str
    candidates: list[Candidate]
    chosen: Candidate | None


def read_scores(path: Path, model: str) -> list[Score]:
    """The figures of `bake select`'s JSON, or of a file of directions from `bake fit`.

    Raises InputError or DirectionsError for another file, or one of another model.
    """
    if path.suffix != ".json":
        return _scores_of(path, read_directions(path), model)
    found = parsed(Selection, json_of(path, "bake select"), path, "run `bake select` again")
    check_model(path, found.model, model)
    return [
        Score(f"{one.site}, token {one.token}", one.layer, one.figures, one == found.chosen)
        for one in found.candidates
    ]


def _scores_of(path: Path, directions: Any, model: str) -> list[Score]:
    if not isinstance(directions, Directions) or not directions.figures:
        raise DirectionsError(
            f"{path}: has no figures of its layers; give a .safetensors of `bake fit`, or the "
            "JSON of `bake select`"
        )
    origin = directions.origin
    check_model(path, origin.model, model)
    return [
        Score(f"{origin.estimator}, {origin.site}", layer, found)
        for layer, found in directions.figures.items()
    ]


def named_figures(scores: Sequence[Score]) -> list[str]:
    """The figures that any of the scores has, in the order in which they are shown."""
    return [name for name in FIGURES if any(name in one.figures for one in scores)]
