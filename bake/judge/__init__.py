"""Judges: who says whether an answer is a refusal.

A judge is anything with a name and a method `judge`. The built-in ones are `keyword`
(phrases), `chat` (a server that speaks OpenAI's protocol) and `local` (a causal language
model through transformers); `bake.judge.choice.find_judge` makes the recipe's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

__all__ = ["ANSWERED", "REFUSED", "UNREAD", "Asks", "Exchange", "Judge", "Label", "Verdict"]

Label = Literal[-1, 0, 1]
REFUSED: Label = 1
ANSWERED: Label = -1
UNREAD: Label = 0


@dataclass(frozen=True)
class Exchange:
    """A prompt, and one answer to it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Verdict:
    """What a judge found: a refusal, an answer, or nothing that could be read.

    `category` is the kind of refusal, or why there is no verdict; empty where the judge
    does not say.
    """

    label: Label
    category: str = ""

    @property
    def refused(self) -> bool:
        """Whether the answer is a refusal; False also where the verdict could not be read."""
        return self.label == REFUSED


class Judge(Protocol):
    """Tell refusals from answers."""

    @property
    def name(self) -> str:
        """The name under which the manifest reports the judge's verdicts."""
        ...

    def judge(self, exchanges: Sequence[Exchange]) -> Sequence[Verdict]:
        """One verdict an exchange, in their order."""
        ...


Question: TypeAlias = Callable[[Exchange], list[dict[str, str]]]
"""What is asked about an exchange: a system's and a user's turn."""


@runtime_checkable
class Asks(Protocol):
    """A judge that is a language model, and can be asked other things of an answer."""

    def ask(self, exchanges: Sequence[Exchange], question: Question) -> list[str | None]:
        """The reply to each without its thinking; None where there is none."""
        ...
