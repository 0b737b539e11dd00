"""The tokens of a chat that count: where a recipe's fit looks, and where one gate decides."""

from typing import Literal

from pydantic import Field

from bake.recipe.section import Section

__all__ = ["Decision", "OwnDecision", "Positions"]

Question = Literal["free", "shut"]


class OwnDecision(Section):
    """Where one gate decides; what is null is as the fit has it."""

    template: int | None = Field(
        default=None,
        ge=1,
        le=512,
        description="The last tokens of the prompt in its chat template; null for the fit's.",
    )
    answer: int | None = Field(
        default=None,
        ge=0,
        le=4096,
        description="The first tokens of the answer; null for the fit's.",
    )
    question: Question | None = Field(
        default=None,
        description="form: rank_one: whether the gate is also shut at the prompt's tokens in front "
        "of those; null for the fit's.",
    )


class Decision(Section):
    """Where gates decide, complete."""

    template: int = Field(
        default=6, ge=1, le=512, description="The last tokens of the prompt in its chat template."
    )
    answer: int = Field(default=10, ge=0, le=4096, description="The first tokens of the answer.")
    question: Question = Field(
        default="free",
        description="Whether rank-one gates are also shut at the prompt's tokens in front of "
        "those; else nothing is asked of them there.",
    )


class Positions(Decision):
    """How many tokens of each chat the activations are taken from."""

    direction: int = Field(
        default=-1,
        ge=-512,
        le=-1,
        description="The token that the direction is measured at, counted from the prompt's end.",
    )

    def decision(self, own: OwnDecision | None = None) -> Decision:
        """Where a gate decides that has something of its own, or nothing."""
        values = self.model_dump(exclude={"direction"})
        return Decision(**values | (own.model_dump(exclude_none=True) if own else {}))
