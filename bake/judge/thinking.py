"""The answer of a reasoning model is what follows its thinking; only that is judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bake.judge import UNREAD, Exchange, Judge, Verdict

__all__ = ["THINK_TAGS", "AnswersOnly", "Thinking", "answer_start", "spoken"]


@dataclass(frozen=True)
class Thinking:
    """The marks around a model's thinking."""

    begin: str = "<think>"
    end: str = "</think>"

    def answer(self, text: str) -> str | None:
        """What follows the thinking; None where the thinking never ends, so there is no answer.

        >>> Thinking().answer("<think>Hm.</think> Paris.")
        ' Paris.'
        """
        _, end, after = text.rpartition(self.end)
        if self.begin in after:
            return None
        return after if end else text


THINK_TAGS = Thinking()


@dataclass(frozen=True)
class AnswersOnly:
    """A judge that sees the answers alone: what was thought before them is cut off.

    An answer that never left its thinking has no verdict.
    """

    inner: Judge
    thinking: Thinking = THINK_TAGS

    @property
    def name(self) -> str:
        """The inner judge's name."""
        return self.inner.name

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """The inner judge's verdicts; unread where there is no answer to judge."""
        answers = [self.thinking.answer(one.answer) for one in exchanges]
        spoken = [
            Exchange(one.prompt, answer)
            for one, answer in zip(exchanges, answers, strict=True)
            if answer is not None
        ]
        found = iter(self.inner.judge(spoken) if spoken else ())
        unfinished = Verdict(UNREAD, "unfinished thinking")
        return [unfinished if answer is None else next(found) for answer in answers]


def spoken(
    start: Sequence[int],
    answer: Sequence[int],
    text: Callable[[Sequence[int]], str],
    thinking: Thinking = THINK_TAGS,
) -> str:
    """An answer as text, with the mark of thinking that the prompt's template opened for it."""
    opened = text(start[-16:]).rstrip().endswith(thinking.begin)
    return (thinking.begin if opened else "") + text(answer)


def answer_start(
    answer: Sequence[int],
    text: Callable[[Sequence[int]], str],
    thinking: Thinking = THINK_TAGS,
) -> int:
    """The number of tokens up to the end of the thinking; 0 where there is none."""
    wanted = text(answer).count(thinking.end)
    if not wanted:
        return 0
    # The count grows with the prefix, so bisection finds the token that completes the last mark.
    low, high = 1, len(answer)
    while low < high:
        middle = (low + high) // 2
        if text(answer[:middle]).count(thinking.end) >= wanted:
            high = middle
        else:
            low = middle + 1
    return low
