"""Near duplicates: prompts that say the same but for a few characters."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["plain", "repeated"]

LENGTH = 5  # characters of a piece
ALIKE = 0.9


def plain(text: str) -> str:
    """Text without what makes no other prompt: case, spacing, punctuation, character widths."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    marks = "".join(" " if unicodedata.category(c)[0] in "CPZ" else c for c in folded)
    return " ".join(marks.split()) or text


def repeated(parts: Sequence[Sequence[str]], alike: float = ALIKE) -> list[set[int]]:
    """By part the places of texts that a part before it has too, nearly.

    Two texts are nearly the same when they share 90 % of all pieces of five characters that
    either has (Jaccard), case and punctuation aside, and the same numbers: 1989 is not 1992.
    Exact, and without comparing every pair: texts that are so alike share one of their rarest
    pieces (prefix filtering, Chaudhuri et al. 2006, "A primitive operator for similarity
    joins").

    >>> repeated([["How long do eggs boil?"], ["how long do eggs boil", "How hot is tea?"]])
    [set(), {0}]
    """
    texts = [[_Text.of(text) for text in part] for part in parts]
    common = Counter(piece for part in texts for found in part for piece in found.pieces)
    known: dict[str, list[_Text]] = {}
    twins: list[set[int]] = []
    for part in texts:
        rare = [_rarest(found.pieces, common, alike) for found in part]
        twins.append(
            {
                place
                for place, (found, keys) in enumerate(zip(part, rare, strict=True))
                if any(_alike(found, other, alike) for key in keys for other in known.get(key, ()))
            }
        )
        for found, keys in zip(part, rare, strict=True):
            for key in keys:
                known.setdefault(key, []).append(found)
    return twins


@dataclass(frozen=True)
class _Text:
    """The pieces of a text, and its numbers in their order."""

    pieces: frozenset[str]
    numbers: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> "_Text":
        bare = plain(text)
        starts = range(max(1, len(bare) - LENGTH + 1))
        pieces = frozenset(bare[start : start + LENGTH] for start in starts)
        return cls(pieces, tuple(re.findall(r"\d+", bare)))


def _rarest(found: frozenset[str], common: Counter[str], alike: float) -> list[str]:
    """As many of the rarest pieces as no equally alike text can be without."""
    count = len(found) - math.ceil(alike * len(found)) + 1
    return sorted(found, key=lambda piece: (common[piece], piece))[:count]


def _alike(one: _Text, other: _Text, alike: float) -> bool:
    shared = len(one.pieces & other.pieces)
    either = len(one.pieces) + len(other.pieces) - shared
    return one.numbers == other.numbers and shared >= alike * either
