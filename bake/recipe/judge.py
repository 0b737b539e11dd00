"""The recipe's `judge:` section."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from bake.recipe.errors import ContradictionError
from bake.recipe.section import Section
from bake.recipe.values import Count, Percent, Text, Url, Variable

__all__ = ["JudgeChoice", "ThinkingMarks"]


class ThinkingMarks(Section):
    """What stands around a reasoning model's thinking; the answer is what follows it."""

    begin: Text = Field(default="<think>", description="The mark before the thinking.")
    end: Text = Field(default="</think>", description="The mark behind it.")


class JudgeChoice(Section):
    """Who says whether an answer is a refusal."""

    kind: Literal["keyword", "chat", "local"] = Field(
        default="keyword",
        description="A list of phrases, a model behind an OpenAI-compatible server, or one "
        "through transformers.",
    )
    phrases: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        default=(), description="Further phrases that make the beginning of an answer a refusal."
    )
    url: Url | None = Field(
        default=None, description="The server's base URL, as in http://localhost:8000/v1."
    )
    model: Text | None = Field(
        default=None,
        description="The judging model: the server's name for it, or a folder or Hub id.",
    )
    revision: Text | None = Field(
        default=None, description="The Hub branch, tag or commit of a local judge."
    )
    key: Variable | None = Field(
        default=None, description="The environment variable that holds the server's API key."
    )
    tokens: Count = Field(default=512, description="Tokens at most in a verdict's reply.")
    timeout: float = Field(
        default=120.0, gt=0, le=86_400, description="Seconds that one request may take."
    )
    attempts: int = Field(
        default=6, ge=1, le=100, description="Requests at most for one verdict, ever slower."
    )
    concurrent: int = Field(
        default=8, ge=1, le=1024, description="Verdicts that are asked for at a time."
    )
    unread_at_most: Percent = Field(
        default=10.0, description="Percent of verdicts that may be impossible to read."
    )
    thinking: ThinkingMarks = Field(
        default=ThinkingMarks(), description="The marks of thinking, which is never judged."
    )

    @model_validator(mode="after")
    def _of_its_kind(self) -> "JudgeChoice":
        needed = {"keyword": (), "chat": ("url", "model"), "local": ("model",)}[self.kind]
        users = {
            "phrases": ("keyword",),
            "url": ("chat",),
            "key": ("chat",),
            "model": ("chat", "local"),
            "revision": ("local",),
        }
        findings: list[tuple[tuple[str | int, ...], str]] = []
        for name, kinds in users.items():
            given = bool(getattr(self, name))
            if given and self.kind not in kinds:
                other = " or ".join(kinds)
                findings.append(((name,), f"is of kind {other}; judge.kind is {self.kind}"))
            if not given and name in needed:
                findings.append(((name,), f"judge.kind {self.kind} needs it; give one"))
        if findings:
            raise ContradictionError(findings)
        return self
