"""Two texts that grow, side by side, line by line."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest

__all__ = ["beside", "printable", "side_by_side", "width_of", "wrapped"]

MIDDLE = " │ "
TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def side_by_side(left: Iterable[str], right: Iterable[str], width: int) -> Iterator[str]:
    """Lines of two columns of `width`, each as soon as both texts have it.

    The texts come in pieces, one of each in turn.
    """
    streams, texts, shown = (iter(left), iter(right)), ["", ""], 0
    open_ones = {0, 1}
    while True:
        for place in sorted(open_ones):
            piece = next(streams[place], None)
            if piece is None:
                open_ones.discard(place)
            else:
                texts[place] += printable(piece)
        lines = [wrapped(text, width) for text in texts]
        # Of a text that goes on the last line may still change.
        ready = [len(found) - (place in open_ones) for place, found in enumerate(lines)]
        last = min(ready[place] for place in open_ones) if open_ones else max(ready)
        yield from beside([found[shown:last] for found in lines], width)
        shown = max(shown, last)
        if not open_ones:
            return


def beside(lines: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """The lines of two columns; the shorter one ends in empty ones."""
    for left, right in zip_longest(*lines, fillvalue=""):
        yield f"{left}{' ' * (width - width_of(left))}{MIDDLE}{right}".rstrip()


def wrapped(text: str, width: int) -> list[str]:
    """The text in lines of at most `width` columns, broken at spaces where there are some.

    A longer text has the same lines, but for the last one. Not empty.

    >>> wrapped("one two three", 8)
    ['one two', 'three']
    """
    lines = []
    for paragraph in text.expandtabs(4).split("\n"):
        line = ""
        for word in re.findall(r" *[^ ]+| +$", paragraph):
            if line and width_of(line + word) > width:
                lines.append(line)
                line = ""
                word = word.lstrip(" ")
            line += word
            while width_of(line) > width:
                cut = _cut(line, width)
                lines.append(line[:cut])
                line = line[cut:]
        lines.append(line)
    return lines


def width_of(text: str) -> int:
    """The columns of a terminal that a text takes: East Asian characters two, marks none."""
    return sum(
        0
        if unicodedata.combining(one) or unicodedata.category(one) in ("Cf", "Mn", "Me")
        else 2
        if unicodedata.east_asian_width(one) in "WF"
        else 1
        for one in text
    )


def printable(text: str) -> str:
    """The text without what would steer a terminal: control characters, turns of direction."""
    return "".join("\N{REPLACEMENT CHARACTER}" if _steers(one) else one for one in text)


def _steers(one: str) -> bool:
    return one in TURNS or (unicodedata.category(one) in ("Cc", "Cs") and one not in "\n\t")


def _cut(line: str, width: int) -> int:
    """How many characters fit, one at least."""
    for count in range(1, len(line)):
        if width_of(line[: count + 1]) > width:
            return count
    return len(line)
