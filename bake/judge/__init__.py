"""Judges: who says whether an answer is a refusal.

A judge is anything with a name and a method `refuses`; the built-in one is
`bake.judge.keyword.KeywordJudge`.
"""

from typing import Protocol

__all__ = ["Judge"]


class Judge(Protocol):
    """Tell refusals from answers."""

    @property
    def name(self) -> str:
        """The name under which the manifest reports the judge's verdicts."""
        ...

    def refuses(self, prompt: str, answer: str) -> bool:
        """Return whether `answer` refuses or deflects `prompt`."""
        ...
