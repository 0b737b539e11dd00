"""Whether an answer is text at all: how much of it is said again, and whether it is broken."""

import unicodedata
from collections.abc import Sequence

from bake.prompts.near import plain

__all__ = ["LOOP", "broken", "mean", "repeated_share", "words"]

# From this share of repeated runs on an answer is a loop, if it is long enough to be one.
LOOP = 0.5
LONG = 16
RUN = 4


def words(text: str) -> list[str]:
    """The words of a text without case and punctuation; each Chinese character is one.

    >>> words("Yes. 是的!")
    ['yes', '是', '的']
    """
    found: list[str] = []
    for word in plain(text).split():
        rest = ""
        for character in word:
            if unicodedata.name(character, "").startswith("CJK UNIFIED"):
                found += [rest, character] if rest else [character]
                rest = ""
            else:
                rest += character
        found += [rest] if rest else []
    return found


def repeated_share(text: str, run: int = RUN) -> float:
    """1 - distinct runs of `run` words / all of them: 0 where nothing is said twice.

    seq-rep-n of Welleck et al. 2020 (arXiv:1908.04319, section 5.1), on words in place of tokens,
    so that runtimes and tokenizers can be compared.

    >>> repeated_share("a b c d a b c d")
    0.2
    """
    found = words(text)
    runs = [tuple(found[start : start + run]) for start in range(len(found) - run + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def broken(text: str) -> bool:
    """Whether an answer is no text: without a word, or a loop (of 16 words and more).

    Greedy answers of a damaged model loop (Holtzman et al. 2020, arXiv:1904.09751, section 3).
    """
    found = words(text)
    alone = not any(character.isalnum() for character in text)
    return alone or (len(found) >= LONG and repeated_share(text) >= LOOP)


def mean(values: Sequence[float]) -> float:
    """The mean; 0 of none."""
    return sum(values) / len(values) if values else 0.0
