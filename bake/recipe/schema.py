"""The schema of a recipe: its sections, and what they say of each other.

Every field has its meaning, its bounds and its default. All of it is frozen and strict; YAML's
lists become tuples.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from bake.recipe.checks import Evaluation, Guard, Verification
from bake.recipe.edits import Ablate, Add, Gate
from bake.recipe.errors import ContradictionError
from bake.recipe.export import Export
from bake.recipe.fit import Fit
from bake.recipe.judge import JudgeChoice
from bake.recipe.positions import Decision
from bake.recipe.prompts import PromptRoles
from bake.recipe.search import Search
from bake.recipe.section import Section
from bake.recipe.values import BY_GRADIENT, SEVERAL, Name, Serving, Text

__all__ = ["Recipe"]


class Recipe(Section):
    """Everything that a bake is told. Frozen; `model_copy(update=...)` checks nothing again."""

    name: Name = Field(
        description="The name of the result; a recipe file's own name where it is left out."
    )
    description: str = Field(default="", description="What the recipe is for.")
    model: Text = Field(default="demo", description="`demo`, a local folder, or a Hub id.")
    revision: Text | None = Field(default=None, description="A Hub branch, tag or commit.")
    trust_remote_code: bool = Field(
        default=False,
        description="Whether the tokenizer's own Python code, which comes with the model, may run; "
        "`--trust-remote-code` confirms it on the command line.",
    )
    output: Text | None = Field(default=None, description="The folder to write; null for the name.")
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="The seed of everything random.")
    prompts: PromptRoles = Field(default=PromptRoles(), description="The prompt sets, by role.")
    system_prompt: Text | None = Field(
        default=None,
        description="What stands in front of every prompt as the system's turn; null leaves that "
        "to the chat template.",
    )
    fit: Fit = Field(default=Fit(), description="How the direction is estimated.")
    directions: Text | None = Field(
        default=None,
        description="A file of directions (.safetensors, .gguf, .npy, .pt) that stand in for "
        "estimated ones.",
    )
    edits: Annotated[
        tuple[Annotated[Add | Ablate | Gate, Field(discriminator="op")], ...],
        Field(strict=False, min_length=1),
    ] = Field(description="What is done to the weights.")
    export: Export = Field(default=Export(), description="What is written.")
    judge: JudgeChoice = Field(default=JudgeChoice(), description="Who recognises refusals.")
    evaluate: Evaluation = Field(default=Evaluation(), description="How behaviour is measured.")
    verify: Verification = Field(default=Verification(), description="How parity is measured.")
    guard: Guard = Field(default=Guard(), description="What the bake promises.")
    search: Search | None = Field(
        default=None, description="What `bake search` may change; a bake does not look at it."
    )
    runtimes: Serving = Field(
        default=("transformers", "llama.cpp", "ollama"),
        description="The runtimes that the result is for; they decide the carriers.",
    )

    @property
    def folder(self) -> Path:
        """The output folder: `output`, or the name in the current folder."""
        return Path(self.output or self.name)

    def decides(self, gate: Gate) -> Decision:
        """Where a gate decides: at the fit's positions, but for what it has of its own."""
        return self.fit.positions.decision(gate.positions)

    @property
    def answered(self) -> int:
        """Tokens at most in the base model's answers: what labels need, and what gates read."""
        gates = (self.decides(edit) for edit in self.edits if isinstance(edit, Gate))
        read = [one.answer for one in (self.fit.positions, *gates)]
        return max(self.fit.answers.tokens, *read)

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        findings = list(_contradictions(self))
        if findings:
            raise ContradictionError(findings)
        return self


def _contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    fit, export = recipe.fit, recipe.export
    if not export.safetensors and export.gguf is None:
        yield ("export",), "nothing is exported; set safetensors: true or give a gguf"
    if "gguf" in export.adapters and (export.gguf is None or export.gguf.convert):
        message = "a LoRA for llama.cpp is of a GGUF; give it as export.gguf.base"
        yield ("export", "adapters"), message
    kept = (one.op == "ablate" and "norm-preserving" in one.variant for one in recipe.edits)
    if export.adapters and any(kept):
        message = "a norm-preserving ablation is of full rank, and a LoRA is not; leave one out"
        yield ("export", "adapters"), message
    steered = all(one.op == "add" and one.site == "out" and one.layer for one in recipe.edits)
    if export.control_vector and not steered:
        message = "llama.cpp adds it after blocks from 1 on; leave it out, or use add, site: out"
        yield ("export", "control_vector"), message
    if "llama.cpp" in recipe.evaluate.runtimes and export.gguf is None:
        remedy = "set export.gguf, or evaluate.runtimes to [transformers]"
        yield ("evaluate", "runtimes"), f"llama.cpp answers from a GGUF and none is made; {remedy}"
    if fit.weights == "doubt" and any(
        one.op == "gate" and one.form == "block" for one in recipe.edits
    ):
        message = "is of rank-one gates, and edits has a gate of form: block; leave one out"
        yield ("fit", "weights"), message
    if recipe.directions is not None:
        return  # what follows is about classes that make a direction, and none is made
    if fit.contrast == "lookalike" and recipe.prompts.lookalike is None:
        yield ("fit", "contrast"), "prompts.lookalike is null; name a set there"
    if fit.refused == "refused" and recipe.prompts.refused is None:
        yield ("fit", "refused"), "prompts.refused is null; name a set there"
    if fit.contrast == "protected" and fit.refused == "protected":
        yield ("fit", "contrast"), "fit.refused is protected too; compare it with another class"
    if fit.protect != "none" and fit.refused == "protected":
        yield ("fit", "protect"), "fit.refused is protected; without itself nothing is left of it"
    if fit.estimator in BY_GRADIENT and fit.site != "out":
        yield ("fit", "site"), f"{fit.estimator} learns a vector behind whole blocks; use out"
    if fit.estimator == "cosmic" and fit.layer is not None:
        yield ("fit", "layer"), "cosmic chooses the layer; leave this out"
    if fit.categories and fit.estimator != "low-rank-mix":
        yield ("fit", "categories"), f"fit.estimator is {fit.estimator}; low-rank-mix mixes them"
    if fit.estimator in SEVERAL and fit.basis > 1:
        for number, edit in enumerate(recipe.edits):
            if not edit.several:
                yield (
                    ("edits", number, "op"),
                    f"{edit.op} takes one direction a layer, fit.estimator: {fit.estimator} gives "
                    f"{fit.basis}; use op: ablate or fit.basis: 1",
                )
    if fit.concepts and fit.protect != "residual":
        yield ("fit", "concepts"), f"fit.protect is {fit.protect}; residual is what protects them"
