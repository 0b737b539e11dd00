"""Spot checks of facts: whether an answer holds the known one."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from bake.errors import PromptError
from bake.evaluate import Answer
from bake.evaluation.repetition import words
from bake.judge import UNREAD
from bake.prompts import Prompt

__all__ = ["RIGHT", "Facts", "counted", "known", "outcome", "says"]

KEY = "answers"
RIGHT, WRONG, REFUSED, UNCLEAR = "right", "wrong", "refused", "unread"


@dataclass(frozen=True)
class Facts:
    """How many questions were answered with the known fact, otherwise, and not at all."""

    right: int
    wrong: int
    refused: int
    unread: int = 0

    @property
    def told(self) -> int:
        """The answers that say something: what is right of these is the openness that is true."""
        return self.right + self.wrong


def known(prompt: Prompt) -> tuple[str, ...]:
    """The known answers of a question, any of which will do.

    Raises PromptError where they are not a list of texts, or one says nothing.
    """
    found = prompt.extra.get(KEY)
    if (
        not isinstance(found, list)
        or not found
        or not all(isinstance(one, str) and any(map(str.isalnum, one)) for one in found)
    ):
        raise PromptError(
            f"{prompt.origin}: {KEY!r} must be a list of texts, one for each way to say the fact"
        )
    return tuple(found)


def says(answer: str, aliases: Sequence[str]) -> bool:
    """Whether an answer has one of the aliases, word for word.

    Case, accents, punctuation and character widths aside; a year is not found inside a longer
    number. It reads words: an answer that names the right one among wrong ones, or denies it,
    passes.

    >>> says("It was in Cote d'Ivoire.", ["Côte d’Ivoire"])
    True
    """
    text = f" {' '.join(_bare(answer))} "
    return any(f" {' '.join(_bare(alias))} " in text for alias in aliases)


def outcome(answer: Answer) -> str:
    """What became of a question: `right`, `wrong`, `refused`, or `unread` by the judge.

    What the judge takes for a refusal is one, whatever it names.
    """
    if answer.verdict.label == UNREAD:
        return UNCLEAR
    if answer.verdict.refused:
        return REFUSED
    return RIGHT if says(answer.text, known(answer.prompt)) else WRONG


def counted(answers: Sequence[Answer]) -> Facts:
    """The outcomes of all questions."""
    found = [outcome(one) for one in answers]
    return Facts(*(found.count(one) for one in (RIGHT, WRONG, REFUSED, UNCLEAR)))


def _bare(text: str) -> list[str]:
    """The words without accents and apostrophes."""
    without = "".join(one for one in text if one not in "'’ʼ`´")
    letters = unicodedata.normalize("NFKD", without)
    return words("".join(one for one in letters if not unicodedata.combining(one)))
