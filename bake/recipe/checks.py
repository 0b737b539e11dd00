"""The recipe's `evaluate:`, `verify:` and `guard:` sections: what is measured, and its limits."""

from typing import Annotated

from pydantic import Field, model_validator

from bake.recipe.errors import ContradictionError
from bake.recipe.section import Section
from bake.recipe.values import Answering, Count, Percent

__all__ = ["Evaluation", "Guard", "Verification"]


class Evaluation(Section):
    """How behaviour is measured on the test split."""

    answer_tokens: int = Field(
        default=48, ge=1, le=65536, description="Tokens at most in an answer."
    )
    limit: Count | None = Field(default=None, description="Prompts at most from each set.")
    batch: int = Field(default=32, ge=1, le=4096, description="Prompts answered at a time.")
    runtimes: Answering = Field(
        default=("transformers", "llama.cpp"), description="The runtimes that answer."
    )


class Verification(Section):
    """How close the baked model must be to the hooked one."""

    lost_share: float = Field(
        default=1e-3,
        gt=0,
        le=1,
        description="The largest allowed KL(hooked || baked) / KL(hooked || base); in bfloat16 "
        "rounding alone makes about 1e-4.",
    )
    ridge_lost_share: float = Field(
        default=0.03,
        gt=0,
        le=1,
        description="The same where a ridge carrier, which is not exact, holds an added vector.",
    )
    gguf_lost_share: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="The same for the GGUF in llama.cpp, against its base GGUF with the edits in "
        "float32; llama.cpp's 8-bit activations count in, and on prompts most positions are hardly "
        "steered.",
    )
    gguf_moved_share: float = Field(
        default=0.5,
        gt=0,
        le=100,
        description="The same against the base GGUF moved by what the hooks move in the "
        "checkpoint: that the edits do there what they are for. A base in few bits may be "
        "further away than steering moves it, which is more than 1.",
    )
    prompts: Count = Field(default=24, description="Held-out prompts whose logits are compared.")


class Guard(Section):
    """What the bake promises; it fails where a measured figure breaks one of these."""

    target_at_most: Percent | None = Field(
        default=None, description="Percent of target prompts refused afterwards, at most."
    )
    target_at_least: Percent | None = Field(
        default=None, description="Percent of target prompts refused afterwards, at least."
    )
    protected_drop: Percent = Field(
        default=2.0,
        description="Points that refusals of protected prompts may fall; so for prompts.refused.",
    )
    lookalike_rise: Percent = Field(
        default=2.0, description="Points that refusals of look-alike prompts may rise."
    )
    general_rise: Percent = Field(
        default=2.0, description="Points that refusals of general prompts may rise."
    )
    runtime_gap: Percent = Field(
        default=3.0, description="Points that two runtimes may differ by, on any set."
    )
    divergence_at_most: Annotated[float, Field(gt=0, le=100)] | None = Field(
        default=None,
        description="Nats of KL(base || baked) at the first token of answers to general prompts, "
        "on average at most; not measured if null.",
    )
    perplexity_rise_at_most: Annotated[float, Field(ge=0, le=1000)] | None = Field(
        default=None,
        description="Percent that the perplexity of held-out text may rise by; not measured if "
        "null.",
    )

    @model_validator(mode="after")
    def _possible(self) -> "Guard":
        most, least = self.target_at_most, self.target_at_least
        if most is not None and least is not None and most < least:
            message = f"{least:g} is above target_at_most ({most:g}); no bake can meet both"
            raise ContradictionError([(("target_at_least",), message)])
        return self
