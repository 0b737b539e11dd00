"""A map of `bake geometry`: what steering along each direction trades, and their cosines."""

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from bake.evidence.reading import Read, json_of, parsed

__all__ = ["Geometry", "Point", "read_geometry"]


class Kind(Read):
    """A kind of refusal and its direction."""

    meaning: str
    prompts: int
    refused: int
    by: str
    gap: float
    spread: float


class Cosines(Read):
    """Between the directions of all names."""

    names: list[str]
    values: list[list[float]]

    @model_validator(mode="after")
    def _square(self) -> Self:
        size = len(self.names)
        if [len(row) for row in self.values] != [size] * size:
            raise ValueError(f"expected {size} rows of {size} values, one for each name")
        return self


class Traded(Read):
    """Percent refused by set, and KL in nats."""

    refused: dict[str, float]
    divergence: float


class Point(Traded):
    """What a strength trades, as docs/geometry.md has it."""

    strength: float


class Trades(Read):
    """A curve for each direction; `length` is what all are scaled to."""

    length: float
    prompts: dict[str, int]
    base: Traded
    curves: dict[str, list[Point]]

    @model_validator(mode="after")
    def _same_sets(self) -> Self:
        every = [point for curve in self.curves.values() for point in curve]
        if any(point.refused.keys() != self.base.refused.keys() for point in every):
            raise ValueError("a point of a curve is of other sets than the base")
        return self


class Geometry(Read):
    """The file."""

    format: Literal["bake.geometry"]
    version: Literal[1]
    model: str
    recipe: str
    layer: int
    contrast: str
    kinds: dict[str, Kind]
    controls: dict[str, str]
    cosines: Cosines
    trades: Trades


def read_geometry(path: Path) -> Geometry:
    """A map; raises InputError where the file is none."""
    return parsed(Geometry, json_of(path, "bake geometry"), path, "run `bake geometry` again")
