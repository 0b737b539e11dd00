"""The recipe's `edits:` section: the operators."""

from math import copysign
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from bake.recipe.errors import ContradictionError
from bake.recipe.positions import OwnDecision
from bake.recipe.section import Section
from bake.recipe.values import Layer, Layers, Percent, Ridge, Sites, Strength, Text, Variants

__all__ = ["Ablate", "Add", "Gate", "Kernel"]


class Add(Section):
    """Add the direction to the residual stream after one block, on every token."""

    several: ClassVar[bool] = False

    op: Literal["add"] = Field(description="The operator.")
    layer: Layer = Field(description="The block, counted from 0.")
    site: Literal["in", "mid", "out"] = Field(
        default="out", description="Before the block, after its attention, or after all of it."
    )
    strength: Strength = Field(description="How far, in class gaps; negative is away from refusal.")
    carrier: Literal["auto", "bias", "block", "ridge", "embedding"] = Field(
        default="auto",
        description="What in the weights holds the vector; the plan chooses under `auto`.",
    )
    ridge: Ridge = Field(
        default=0.01,
        description="The ridge of the constant that a ridge carrier reads, in units of "
        "tr(Gram matrix) / width.",
    )
    constant_error: float = Field(
        default=0.2,
        gt=0,
        description="How far that constant may be from 1 on held-out text (root mean square).",
    )


class Kernel(Section):
    """How the strength falls, in a straight line, with the distance from one block."""

    peak: Layer = Field(description="The block that is edited at full strength.")
    width: int = Field(
        ge=1, le=1000, description="The distance in blocks behind which no block is edited."
    )
    edge: float = Field(default=0.0, ge=-2, le=2, description="The strength at that distance.")


class Ablate(Section):
    """Take the direction, or several, out of everything that the chosen blocks write."""

    several: ClassVar[bool] = True  # Whether it takes more than one direction of a layer.

    op: Literal["ablate"] = Field(description="The operator.")
    layers: Layers = Field(description='The blocks, as a list or as a range like "11-17".')
    strength: float = Field(
        default=1.0, ge=-2, le=2, description="The share that is removed; 2 mirrors the direction."
    )
    embeddings: bool = Field(
        default=False, description="Whether the token embedding is edited too."
    )
    variant: Variants = Field(
        default=("plain",),
        description="`norm-preserving` keeps the norm of every matrix column; the contrast "
        "class's mean is kept out of the direction by `projected`, put back by `affine`. A list "
        "combines them.",
    )
    kernel: Kernel | None = Field(
        default=None, description="How the strength varies over the blocks; constant if null."
    )

    @property
    def strengths(self) -> dict[int, float]:
        """The strength of every layer that is edited: one of strength 0 under a kernel is not."""
        if self.kernel is None:
            return dict.fromkeys(self.layers, self.strength)
        found = {}
        for layer in self.layers:
            share = abs(layer - self.kernel.peak) / self.kernel.width
            strength = (1 - share) * self.strength + share * self.kernel.edge
            if share <= 1 and strength:
                found[layer] = strength
        return found

    @model_validator(mode="after")
    def _consistent(self) -> "Ablate":
        findings: list[tuple[tuple[str | int, ...], str]] = []
        if "plain" in self.variant and len(self.variant) > 1:
            findings.append((("variant",), "plain is without the others; leave it out"))
        if {"projected", "affine"} <= set(self.variant):
            message = (
                "projected makes the direction orthogonal to the mean, so affine has nothing of "
                "it to put back; leave one out"
            )
            findings.append((("variant",), message))
        if self.kernel and "affine" in self.variant:
            message = "variant: affine puts one constant back, for one strength; leave this out"
            findings.append((("kernel",), message))
        if self.kernel and self.embeddings:
            message = "the embedding is no block, so the kernel has no strength for it; set false"
            findings.append((("embeddings",), message))
        if not self.strengths:
            message = "no strength is left for any of the layers; move the peak or widen it"
            findings.append((("kernel",), message))
        if findings:
            raise ContradictionError(findings)
        return self


class Gate(Section):
    """Add the direction where a linear probe sees the target."""

    several: ClassVar[bool] = False

    op: Literal["gate"] = Field(description="The operator.")
    form: Literal["rank_one", "block"] = Field(
        default="rank_one",
        description="A rank-one write to each writer, in proportion to the probe of its input; or "
        "behind each block an inserted one, which opens between two readings of its probe.",
    )
    layers: Layers = Field(description='The blocks, as a list or as a range like "11-17".')
    sites: Sites = Field(
        default=("attention", "mlp"), description="The writers that are edited in each block."
    )
    strength: Strength = Field(
        description="How far in all, in class gaps, spread evenly over the writers; "
        "negative is away from refusal."
    )
    ridge: Ridge = Field(
        default=0.01, description="The ridge of the probe, in units of tr(Gram matrix) / width."
    )
    protected: Annotated[float, Field(ge=0, le=10)] = Field(
        default=0.0,
        description="How far protected prompts are steered towards refusal, where the target is "
        "steered by 1: 0 leaves them where they are.",
    )
    ordered: bool = Field(
        default=False,
        description="Whether the probes are fitted one after another, each with the gates before "
        "it in force and on what they left; else each by itself on the base model.",
    )
    null_space: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="The share of its input's dimensions, those where general prompts and text are "
        "smallest, that a probe reads, so that these are not steered (AlphaSteer); all if null.",
    )
    closed: Percent = Field(
        default=99.0,
        description="form: block: the percent of every other class's tokens, of topics that the "
        "probe was not fitted on, below which the gate is closed.",
    )
    opened: Percent = Field(
        default=90.0,
        description="form: block: the percent of the target's tokens above which the gate is "
        "open in full.",
    )
    elsewhere: bool = Field(
        default=False,
        description="form: block: whether the gate is open everywhere but on the target.",
    )
    positions: OwnDecision = Field(
        default=OwnDecision(),
        description="The tokens at which it decides, where they are not those of fit.positions.",
    )
    probes: Text | None = Field(
        default=None,
        description="A safetensors file with the gate's probes; they are fitted if null.",
    )

    @property
    def heights(self) -> dict[str, float]:
        """What the gate reads where it is open in full, by the role that opens it."""
        found = {"target": 1.0}
        if self.protected:
            found["protected"] = copysign(self.protected, self.strength)
        return found

    @model_validator(mode="after")
    def _of_its_form(self) -> "Gate":
        of_form = {
            **dict.fromkeys(("sites", "ordered", "null_space"), "rank_one"),
            **dict.fromkeys(("closed", "opened", "elsewhere"), "block"),
        }
        findings: list[tuple[tuple[str | int, ...], str]] = [
            ((name,), f"is of form: {form}, and form is {self.form}; leave it out")
            for name, form in of_form.items()
            if form != self.form and getattr(self, name) != type(self).model_fields[name].default
        ]
        if self.probes is not None:
            fitted = {
                "ordered": self.ordered,
                "null_space": self.null_space is not None,
                "positions": self.form == "rank_one" and self.positions != OwnDecision(),
            }
            message = "the probes are those of a file, and none is fitted; leave one out"
            findings += [((name,), message) for name, chosen in fitted.items() if chosen]
        if self.positions.question is not None and self.form == "block":
            message = "is of form: rank_one, and form is block; leave it out"
            findings.append((("positions", "question"), message))
        if self.elsewhere and self.protected:
            message = "elsewhere steers protected prompts as all others; leave one out"
            findings.append((("elsewhere",), message))
        if findings:
            raise ContradictionError(findings)
        return self
