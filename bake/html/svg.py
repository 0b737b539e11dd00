"""A small figure as SVG: a scale, axes, marks. Every text is escaped by the XML library.

Figures have no colours of their own: classes of `figures.css` give them, in light and dark.
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import ceil, floor, log10
from typing import Final
from xml.etree import ElementTree

__all__ = ["Figure", "Scale", "line_kinds", "number", "stylesheet", "ticks"]

NAMESPACE: Final = "http://www.w3.org/2000/svg"
# XML has no other control characters than tab and line breaks.
CONTROLS: Final = dict.fromkeys(
    (*range(32), *range(0x7F, 0xA0), *range(0xD800, 0xE000)), "\N{REPLACEMENT CHARACTER}"
)

# Of a figure as a file: around it, and of its key.
MARGIN, ROW, SAMPLE, LETTER = 8, 15, 20, 6


@dataclass(frozen=True)
class Scale:
    """From values in [low, high] to pixels in [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value; one outside lies on the nearest end."""
        width = self.high - self.low
        share = (value - self.low) / width if width else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


class Figure:
    """A drawing of `width` x `height` pixels, at the size of its text on a telephone.

    `title` is what a screen reader says of it, `key` the kinds of lines by what they are: a page
    has it beside all figures that share it, a file below its own.
    """

    def __init__(
        self, width: float, height: float, title: str, key: Mapping[str, str] | None = None
    ) -> None:
        self.title = title
        self._size = width, height
        self._key = key or {}
        self._root = ElementTree.Element(
            "svg",
            {
                "xmlns": NAMESPACE,
                "class": "figure",
                "role": "img",
                "viewBox": f"0 0 {number(width)} {number(height)}",
                "width": number(width),
                "height": number(height),
            },
        )
        ElementTree.SubElement(self._root, "title").text = title.translate(CONTROLS)

    def text(
        self, x: float, y: float, words: str, kind: str = "label", anchor: str = "start"
    ) -> None:
        """Words at a point of their baseline."""
        found = self._mark("text", kind, {"x": x, "y": y})
        found.set("text-anchor", anchor)
        found.text = words.translate(CONTROLS)

    def line(self, points: Sequence[tuple[float, float]], kind: str, tip: str = "") -> None:
        """Straight lines through points; `tip` shows under the pointer."""
        path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        self._tipped(self._mark("polyline", kind, {"points": path}), tip)

    def dot(self, x: float, y: float, kind: str, radius: float = 3.5, tip: str = "") -> None:
        """A filled or hollow circle."""
        self._tipped(self._mark("circle", kind, {"cx": x, "cy": y, "r": radius}), tip)

    def box(
        self,
        corner: tuple[float, float],
        size: tuple[float, float],
        kind: str,
        opacity: float | None = None,
        tip: str = "",
    ) -> None:
        """A rectangle by its upper left corner."""
        x, y = corner
        found = self._mark("rect", kind, {"x": x, "y": y, "width": size[0], "height": size[1]})
        if opacity is not None:
            found.set("fill-opacity", number(opacity))
        self._tipped(found, tip)

    def across(
        self, scale: Scale, y: float, marks: Iterable[tuple[float, str]], top: float
    ) -> None:
        """A horizontal axis at `y`, with marks (value, words) and lines up to `top`."""
        for value, words in marks:
            x = scale(value)
            self.line([(x, top), (x, y)], "grid")
            self.text(x, y + 13, words, "tick", "middle")
        self.line([(scale.start, y), (scale.end, y)], "axis")

    def up(self, scale: Scale, x: float, marks: Iterable[tuple[float, str]], right: float) -> None:
        """A vertical axis at `x`, with marks (value, words) and lines up to `right`."""
        for value, words in marks:
            y = scale(value)
            self.line([(x, y), (right, y)], "grid")
            self.text(x - 5, y + 3.5, words, "tick", "end")

    def inline(self) -> str:
        """The figure as part of a page, which has the style sheet."""
        return ElementTree.tostring(self._root, encoding="unicode")

    def standalone(self) -> str:
        """The figure as a file of its own: with its style sheet, its key, and paper under it."""
        full = deepcopy(self)
        style = ElementTree.Element("style")
        style.text = f"{stylesheet()}svg.figure {{ background: var(--paper); }}\n"
        full._root.insert(1, style)
        width, height = self._size
        x, y = 0.0, height + ROW
        for name, kind in self._key.items():
            room = SAMPLE + LETTER * len(name) + 2 * MARGIN
            if x and x + room > width:
                x, y = 0.0, y + ROW
            full.line([(x, y - 3.5), (x + SAMPLE, y - 3.5)], kind)
            full.text(x + SAMPLE + 4, y, name, "note")
            x += room
        height = y + 4 if self._key else height
        corner, size = -MARGIN, (width + 2 * MARGIN, height + 2 * MARGIN)
        full._root.set("viewBox", " ".join(map(number, (corner, corner, *size))))
        for side, one in zip(("width", "height"), size, strict=True):
            full._root.set(side, number(one))
        return full.inline() + "\n"

    def _mark(
        self, name: str, kind: str, values: dict[str, float] | dict[str, str]
    ) -> ElementTree.Element:
        attributes = {
            key: value if isinstance(value, str) else number(value) for key, value in values.items()
        }
        return ElementTree.SubElement(self._root, name, {"class": kind, **attributes})

    def _tipped(self, mark: ElementTree.Element, tip: str) -> None:
        if tip:
            ElementTree.SubElement(mark, "title").text = tip.translate(CONTROLS)


def line_kinds(names: Iterable[str]) -> dict[str, str]:
    """A class for each name: six colours, then these dashed, then one for all others."""
    kinds = [f"s{place % 6}{' dashed' * (place // 6)}" for place in range(12)]
    return {name: kinds[place] if place < 12 else "other" for place, name in enumerate(names)}


def ticks(low: float, high: float, count: int = 5) -> list[tuple[float, str]]:
    """Round values in [low, high], about `count`, in steps of 1, 2 or 5, with their words.

    >>> [words for _, words in ticks(0, 100)]
    ['0', '20', '40', '60', '80', '100']
    """
    if not high > low:
        return [(low, number(low))]
    rough = (high - low) / count
    power = 10.0 ** floor(log10(rough))
    step = next(power * one for one in (1, 2, 5, 10) if power * one >= rough * 0.999)
    places = max(0, -floor(log10(step) + 1e-9))
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    return [(place * step, f"{place * step:.{places}f}") for place in range(first, last + 1)]


def number(value: float) -> str:
    """A number for a picture: two decimals, without zeros behind.

    >>> number(1.50)
    '1.5'
    """
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


@cache
def stylesheet() -> str:
    """The style sheet of all figures."""
    return files("bake.html").joinpath("figures.css").read_text(encoding="utf-8")
