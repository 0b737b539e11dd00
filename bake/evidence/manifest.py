"""The values of `bake.json`; `bake.record` writes it."""

from typing import Annotated, Final, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from bake.base_card import BaseCard
from bake.evaluate import Paired, Rate
from bake.evaluation.drift import UNMEASURED, Drift
from bake.evidence.reading import Read

__all__ = ["MOVED", "Converted", "Manifest", "Parity", "Served"]

MOVED: Final = "llama.cpp, as the checkpoint is moved"
"""The parity of a GGUF whose hooked model is its base, moved by what hooks move in the checkpoint.

Under `llama.cpp` it is the base with the edits in float32, where the base is quantised.
"""

Rates = dict[str, dict[str, Rate]]
Layer = Annotated[int, Field(ge=0)]


class Recipe(Read):
    """The recipe as it was given."""

    text: str
    source: str
    overrides: list[str]


class Versions(Read):
    """Of bake, and of the packages by their names."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, str]

    bake: str


class Origin(Read):
    """Where the directions come from."""

    estimator: str = ""
    source: str = ""


class Edit(Read):
    """An edit of a tensor."""

    operator: str
    carrier: str
    layer: int | None
    tensor: str


class Plan(Read):
    """What was edited of which architecture."""

    architecture: str
    layers: int
    width: int
    edits: list[Edit]


class Readings(Read):
    """Histograms of prompts along a direction, by layer and role."""

    low: float
    high: float
    layers: dict[Layer, dict[str, list[int]]]


class Fit(Read):
    """Figures of the directions by layer, and what gates read by edit and module, and role."""

    gaps: dict[Layer, float]
    figures: dict[Layer, dict[str, float]]
    readings: Readings | None = None
    openings: dict[str, dict[str, float]]


class Patched(Read):
    """A tensor of the GGUF, as `PatchedTensor` has it."""

    tensor: str
    base_type: str | None
    written_type: str
    surviving_share: float
    noise: float
    residual: float


class Converted(Read):
    """How the GGUF was made of the checkpoint; as a text, what a person reads of it."""

    type: str
    outtype: str
    apart: float
    imatrix: str | None = None

    def __str__(self) -> str:
        text = (
            f"The GGUF was made of the checkpoint by llama.cpp's own converter, in {self.outtype} "
            f"(logits of the unedited one {self.apart:.2%} from the checkpoint's)"
        )
        if self.type == self.outtype:
            return f"{text}."
        weighed = ", weighed by an importance matrix" if self.imatrix else ""
        return f"{text}, and quantised by llama.cpp: {self.type}{weighed}."


class Served(Read):
    """What the manifest says of a runtime; as a text, what a person reads of it."""

    status: Literal["verified", "by table", "not written"]
    lost_share: float | None = None
    version: str = ""
    trust: list[str] = Field(default_factory=list)
    reads: str = ""

    def __str__(self) -> str:
        if self.lost_share is not None:
            return f"logits compared, lost share {self.lost_share:.1e}"
        if self.status == "not written":
            return f"has nothing to serve: no {self.reads} is written"
        return f"not run; by what is known of {self.version}, {'; '.join(self.trust)}"


class Parity(Read):
    """The figures of `verify.Divergence` that people read."""

    lost_share: float
    largest: float
    largest_effect: float
    positions: int


class Refusals(Read):
    """By runtime and role."""

    before: Rates
    after: Rates

    @model_validator(mode="after")
    def _same_sets(self) -> Self:
        before, after = (
            {name: list(found) for name, found in when.items()}
            for when in (self.before, self.after)
        )
        if before != after:
            raise ValueError("before and after are of other runtimes or sets")
        return self


class Measured(Read):
    """Behaviour, and parity by reference."""

    refusals: Refusals
    paired: dict[str, dict[str, Paired]] = Field(default_factory=dict)
    parity: dict[str, Parity]
    drift: Drift = UNMEASURED


class Guard(Read):
    """The limits of the recipe by their keys."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None]

    protected_drop: float


class Manifest(Read):
    """`bake.json`; `outputs` are the SHA-256 of the files by their paths, once they are written.

    `inputs` are those of what was read by their names, `prompts` fingerprints by role and split.
    """

    name: str
    recipe: Recipe
    model: str
    base: BaseCard
    seed: int
    versions: Versions
    inputs: dict[str, str]
    prompts: dict[str, dict[str, str]]
    directions: Origin
    plan: Plan
    fit: Fit
    residuals: dict[str, float]
    gguf: list[Patched]
    conversion: Converted | None = None
    measured: Measured
    runtimes: dict[str, Served] = Field(default_factory=dict)
    guard: Guard
    broken: list[str] = Field(default_factory=list)
    outputs: dict[str, str] = Field(default_factory=dict)

    @property
    def before(self) -> Rates:
        """Refusals of the base by runtime and role."""
        return self.measured.refusals.before

    @property
    def after(self) -> Rates:
        """Refusals of what was baked by runtime and role."""
        return self.measured.refusals.after

    def changed(self, runtime: str, role: str) -> Paired | None:
        """The prompts of a set that changed; None where the manifest does not say."""
        return self.measured.paired.get(runtime, {}).get(role)
