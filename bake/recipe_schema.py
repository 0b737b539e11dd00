"""The schema of a recipe: every field, its meaning, its bounds, its default.

All of it is frozen and strict; YAML's lists become tuples.
"""

from collections.abc import Iterator
from math import copysign
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from bake.prompts.rows import HUB, Place
from bake.recipe_errors import ContradictionError
from bake.recipe_export import Conversion, Export, GGUFExport
from bake.recipe_fit import Answers, Fit, Positions
from bake.recipe_section import Section as _Section
from bake.recipe_values import (
    BY_GRADIENT,
    SEVERAL,
    Answering,
    Commit,
    Count,
    Language,
    Layer,
    Layers,
    Name,
    Percent,
    Ridge,
    Serving,
    SetName,
    Sites,
    Strength,
    Text,
    Url,
    Variable,
    Variants,
)
from bake.search.schema import Search

__all__ = [
    "Ablate",
    "Add",
    "Answers",
    "Conversion",
    "Evaluation",
    "Export",
    "Fit",
    "GGUFExport",
    "Gate",
    "Guard",
    "JudgeChoice",
    "Kernel",
    "Positions",
    "PromptRoles",
    "PromptSet",
    "PromptSource",
    "Recipe",
    "Search",
    "ThinkingMarks",
    "Verification",
]


class PromptSet(_Section):
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


class PromptRoles(_Section):
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
            if source and all(one.fit_only for one in source.sets):
                message = (
                    "nothing would be left to report on; add a set that is not fitted on alone"
                )
                findings.append(((role, "fit_only"), message))
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


class Add(_Section):
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


class Kernel(_Section):
    """How the strength falls, in a straight line, with the distance from one block."""

    peak: Layer = Field(description="The block that is edited at full strength.")
    width: int = Field(
        ge=1, le=1000, description="The distance in blocks behind which no block is edited."
    )
    edge: float = Field(default=0.0, ge=-2, le=2, description="The strength at that distance.")


class Ablate(_Section):
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


class Gate(_Section):
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
            **dict.fromkeys(("sites", "ordered"), "rank_one"),
            **dict.fromkeys(("closed", "opened", "elsewhere"), "block"),
        }
        findings: list[tuple[tuple[str | int, ...], str]] = [
            ((name,), f"is of form: {form}, and form is {self.form}; leave it out")
            for name, form in of_form.items()
            if form != self.form and getattr(self, name) != type(self).model_fields[name].default
        ]
        if self.ordered and self.probes is not None:
            message = "the probes are those of a file, and none is fitted; leave one out"
            findings.append((("ordered",), message))
        if self.elsewhere and self.protected:
            message = "elsewhere steers protected prompts as all others; leave one out"
            findings.append((("elsewhere",), message))
        if findings:
            raise ContradictionError(findings)
        return self


class ThinkingMarks(_Section):
    """What stands around a reasoning model's thinking; the answer is what follows it."""

    begin: Text = Field(default="<think>", description="The mark before the thinking.")
    end: Text = Field(default="</think>", description="The mark behind it.")


class JudgeChoice(_Section):
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


class Evaluation(_Section):
    """How behaviour is measured on the test split."""

    answer_tokens: int = Field(
        default=48, ge=1, le=65536, description="Tokens at most in an answer."
    )
    limit: Count | None = Field(default=None, description="Prompts at most from each set.")
    batch: int = Field(default=32, ge=1, le=4096, description="Prompts answered at a time.")
    runtimes: Answering = Field(
        default=("transformers", "llama.cpp"), description="The runtimes that answer."
    )


class Verification(_Section):
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


class Guard(_Section):
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


class Recipe(_Section):
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
