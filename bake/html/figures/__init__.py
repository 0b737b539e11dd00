"""The figures of a report, one kind a file: evidence in, small SVG pictures out."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from bake.evidence import Shown
from bake.html.figures.cosines import cosines
from bake.html.figures.readings import readings
from bake.html.figures.refusals import refusals
from bake.html.figures.scores import scores
from bake.html.figures.trades import trades
from bake.html.svg import Figure

__all__ = ["FIGURES", "drawn"]

FIGURES: Final[Mapping[str, Callable[[Shown], Mapping[str, Figure]]]] = MappingProxyType(
    {
        "refusals": refusals,
        "trades": trades,
        "scores": scores,
        "cosines": cosines,
        "readings": readings,
    }
)
"""Every kind of figure: its pictures by name, none where the evidence does not have it."""


def drawn(shown: Shown) -> dict[str, dict[str, Figure]]:
    """The kinds that the evidence has."""
    found = {kind: dict(draw(shown)) for kind, draw in FIGURES.items()}
    return {kind: pictures for kind, pictures in found.items() if pictures}
