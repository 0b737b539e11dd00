"""What a recipe says of its fit."""

from typing import Annotated, Literal

from pydantic import Field

from bake.recipe.positions import Positions
from bake.recipe.section import Section
from bake.recipe.values import (
    BY_GRADIENT,
    Basis,
    Count,
    Estimator,
    Layer,
    Ridge,
    SetName,
)

__all__ = ["Answers", "Fit"]


class Answers(Section):
    """The base model's own answers, from which a prompt's class comes."""

    samples: int = Field(
        default=1,
        ge=1,
        le=100,
        description="Answers to each prompt: one is the greedy one, several are sampled and "
        "weighed by their likelihood.",
    )
    temperature: float = Field(
        default=1.0, gt=0, le=10, description="The temperature of sampled answers."
    )
    tokens: Count = Field(default=16, description="Tokens at most in an answer.")


class Fit(Section):
    """How the direction of refusal is estimated."""

    estimator: Estimator = Field(
        default="mean-difference", description="How a direction is made of two classes."
    )
    site: Literal["mid", "out"] = Field(
        default="out",
        description="Where the direction is measured: after a block's attention, or after all "
        "of it.",
    )
    layer: Layer | None = Field(
        default=None,
        description="The block whose direction all edits take; null for each layer's own.",
    )
    ridge: Ridge = Field(
        default=0.01,
        description="The ridge of rmd, wrmd, lda, logistic and low-rank-mix, in units of "
        "tr(covariance) / width.",
    )
    entries: Count = Field(
        default=200, description="The entries of the direction that `category` keeps."
    )
    basis: Basis = Field(default=4, description="The directions of a layer that som and cone give.")
    map_side: int = Field(
        default=4, ge=1, le=32, description="The side of som's square map, in neurons."
    )
    steps: Count = Field(
        default=100, description="The steps of gradient that cone and low-rank-mix take."
    )
    categories: Annotated[tuple[SetName, ...], Field(strict=False)] = Field(
        default=(),
        description="Further prompt sets, each a kind of refusal whose direction low-rank-mix "
        "mixes, beside those of the refused and the protected class.",
    )
    bootstrap: int | None = Field(
        default=None,
        ge=0,
        le=10_000,
        description="Resamples of the topics behind a direction's spread, 0 for none; null for 20, "
        "and for none where each would be learned anew.",
    )
    prompts_per_class: int = Field(
        default=150, ge=2, le=1_000_000, description="Prompts at most from each class."
    )
    weights: Literal["even", "doubt"] = Field(
        default="even",
        description="How prompts count in the probe of a rank-one gate, of the classes that it "
        "steers: all alike, or by how unsure the model is whether to refuse them.",
    )
    refused: Literal["target", "protected", "refused"] = Field(
        default="target", description="The class that supplies the refusing side of the direction."
    )
    contrast: Literal["general", "lookalike", "protected"] = Field(
        default="general", description="The class that the refusing side is compared with."
    )
    protect: Literal["none", "remove", "residual", "null-space"] = Field(
        default="none",
        description="What is kept out of the direction: `remove` the protected class's direction, "
        "`residual` those of all concepts by ridge regression, `null-space` where the "
        "protected and general prompts' activations lie.",
    )
    protect_strength: float = Field(
        default=1.0, ge=0, le=1, description="The share that `remove` takes out."
    )
    protect_ridge: Ridge = Field(
        default=0.01, description="The ridge of `residual`, in units of the concepts' mean square."
    )
    protect_share: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="The share of the stream's dimensions, those where the prompts' activations "
        "are smallest, that `null-space` leaves to the direction.",
    )
    concepts: Annotated[tuple[SetName, ...], Field(strict=False)] = Field(
        default=(), description="Further prompt sets, each a concept that `residual` protects."
    )
    answers: Answers = Field(
        default=Answers(), description="The answers that say which class a prompt is in."
    )
    positions: Positions = Field(
        default=Positions(), description="The tokens that the activations are taken from."
    )

    @property
    def resamples(self) -> int:
        """How often the topics are drawn again."""
        if self.bootstrap is not None:
            return self.bootstrap
        return 0 if self.estimator in BY_GRADIENT else 20
