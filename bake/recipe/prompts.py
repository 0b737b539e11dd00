"""The recipe's `prompts:` section: a set of prompts or several for every role."""

from typing import Annotated

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from bake.prompts.rows import HUB, Place
from bake.recipe.errors import ContradictionError
from bake.recipe.section import Section
from bake.recipe.values import Commit, Count, Language, SetName, Text

__all__ = ["PromptRoles", "PromptSet", "PromptSource"]


class PromptSet(Section):
    """A set of prompts; a bare string stands for its `set`."""

    set: SetName = Field(
        description="The name of a built-in set, the path of a .jsonl, .txt, .csv or .parquet "
        "file, or hub:owner/name."
    )
    language: Language = Field(default="en", description="The language code to keep, or `any`.")
    limit: Count | None = Field(
        default=None, description="Prompts at most in each of the splits fit, select and test."
    )
    column: Text = Field(default="text", description="The column that holds the prompts.")
    topic: Text = Field(
        default="topic",
        description="The column that holds their topics; without it each prompt is one.",
    )
    revision: Commit | None = Field(
        default=None, description="The commit of a Hub dataset, in full."
    )
    subset: Text | None = Field(
        default=None, description="The subset of a Hub dataset that has several."
    )
    split: Text | None = Field(
        default=None, description="The split of a Hub dataset that is read, train if null."
    )
    fit_only: bool = Field(
        default=False,
        description="Whether all of its prompts are fitted on, beside another set of the role that "
        "is chosen by and reported on.",
    )
    select_only: bool = Field(
        default=False,
        description="Whether settings are chosen by all of its prompts, beside another set of the "
        "role that is fitted and reported on.",
    )

    @property
    def reported(self) -> bool:
        """Whether it has splits of its own, and so prompts to report on."""
        return not (self.fit_only or self.select_only)

    @property
    def place(self) -> Place:
        """Where in the set the prompts are."""
        return Place(self.column, self.topic, self.revision, self.subset, self.split or "train")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        return {"set": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The short form too; and a role has a set of its own where none is named."""
        reference = handler(core)
        full = handler.resolve_ref_schema(reference)
        full.pop("required", None)
        return {"anyOf": [full["properties"]["set"], reference]}

    @model_validator(mode="after")
    def _pinned(self) -> "PromptSet":
        findings: list[tuple[tuple[str | int, ...], str]] = []
        hub = self.set.startswith(HUB)
        if hub and self.revision is None:
            findings.append((("revision",), "a dataset of the Hub needs its commit, to stay as is"))
        if not hub:
            for name in ("revision", "subset", "split"):
                if getattr(self, name) is not None:
                    findings.append(((name,), f"is of a Hub dataset, which {self.set!r} is not"))
        if self.fit_only and self.select_only:
            findings.append((("select_only",), "contradicts fit_only; leave one out"))
        if findings:
            raise ContradictionError(findings)
        return self


class PromptSource(PromptSet):
    """Where the prompts of one role come from.

    A bare string stands for its `set`, and a list for several sets that are one class.
    """

    also: Annotated[tuple[PromptSet, ...], Field(strict=False)] = Field(
        default=(), description="Further sets whose prompts are of the same class."
    )

    @property
    def sets(self) -> tuple[PromptSet, ...]:
        """Every set of the class."""
        return (self, *self.also)

    @model_validator(mode="before")
    @classmethod
    def _list_form(cls, value: object) -> object:
        if not isinstance(value, list) or not value:
            return value
        first, *others = value
        whole = {"set": first} if isinstance(first, str) else first
        return {**whole, "also": others} if isinstance(whole, dict) and others else whole

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The list too, of the sets that `also` lists."""
        found = super().__get_pydantic_json_schema__(core, handler)
        full = handler.resolve_ref_schema(found["anyOf"][-1])
        several = {"type": "array", "items": full["properties"]["also"]["items"], "minItems": 1}
        return {"anyOf": [*found["anyOf"], several]}


class PromptRoles(Section):
    """The prompt sets by the part that they play; no two of them may be the same set."""

    target: PromptSource = Field(
        default=PromptSource(set="political"),
        description="The prompts whose refusals are to change.",
    )
    protected: PromptSource = Field(
        default=PromptSource(set="harmful"), description="The prompts that must stay refused."
    )
    lookalike: PromptSource | None = Field(
        default=PromptSource(set="lookalikes"),
        description="Safe prompts that look like protected ones and must stay answered; "
        "null where they are the target.",
    )
    refused: PromptSource | None = Field(
        default=None,
        description="Prompts of another topic that the model refuses and must go on refusing; "
        "`fit.refused: refused` takes the direction from them.",
    )
    general: PromptSource = Field(
        default=PromptSource(set="general"),
        description="Ordinary prompts that must stay as they are.",
    )
    text: PromptSource = Field(
        default=PromptSource(set="text", language="any"),
        description="Passages for statistics and perplexity.",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_sets(cls, value: object) -> object:
        """Let `target: {limit: 40}` keep the role's own set."""
        if not isinstance(value, dict):
            return value
        filled = dict(value)
        for role, field in cls.model_fields.items():
            given = filled.get(role)
            if isinstance(given, dict) and "set" not in given:
                filled[role] = {**field.default.model_dump(exclude_unset=True), **given}
        return filled

    @model_validator(mode="after")
    def _apart(self) -> "PromptRoles":
        findings: list[tuple[tuple[str | int, ...], str]] = []
        seen: list[tuple[str, PromptSet]] = []
        for role in type(self).model_fields:
            source: PromptSource | None = getattr(self, role)
            if source and not any(one.reported for one in source.sets):
                key = "fit_only" if source.fit_only else "select_only"
                message = f"nothing would be left to report on; add a set without {key}"
                findings.append(((role, key), message))
        for role in ("target", "protected", "lookalike", "refused", "general"):
            source = getattr(self, role)
            for number, found in enumerate(source.sets if source else ()):
                place = (role, "also", number - 1) if number else (role,)
                for other, taken in seen:
                    languages = {found.language, taken.language}
                    if (found.set, found.place) == (taken.set, taken.place) and (
                        len(languages) == 1 or "any" in languages
                    ):
                        remedy = " (or null)" if role == "lookalike" else ""
                        message = (
                            f"{found.set!r} is already prompts.{other}; name another set{remedy}"
                        )
                        findings.append((place, message))
                seen.append((role, found))
        if findings:
            raise ContradictionError(findings)
        return self
