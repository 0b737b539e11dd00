"""The recipe's `search:` section: which keys are open, within what, and how long is searched."""

from collections.abc import Iterator
from math import isfinite
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from bake.recipe.errors import ContradictionError, near
from bake.recipe.section import Section
from bake.recipe.values import Count, Layer

__all__ = ["Parameter", "Search"]


def _number(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ValueError(f"expected a finite number, found {value!r}")
    return value


Finding: TypeAlias = tuple[tuple[str | int, ...], str]
Number: TypeAlias = Annotated[Any, AfterValidator(_number)]  # As it was written: 3 is not 3.0.
Pair: TypeAlias = Annotated[tuple[Layer, Layer], Field(strict=False)]
# Of `fit` these alone: all others decide which prompts are answered and captured, and how.
OF_THE_FIT = (
    "estimator",
    "site",
    "layer",
    "ridge",
    "entries",
    "basis",
    "map_side",
    "steps",
    "refused",
    "contrast",
    "protect",
    "protect_strength",
    "protect_ridge",
    "protect_share",
    "positions.direction",
)


class Parameter(Section):
    """What one key may be: a list of choices, numbers from low to high, or a range of layers.

    A bare list stands for its `choices`; the numbers are whole where `low`, `high` and `step` are.
    """

    choices: Annotated[tuple[Any, ...], Field(strict=False)] | None = Field(
        default=None, description="The values themselves."
    )
    low: Number | None = Field(default=None, description="The smallest number.")
    high: Number | None = Field(default=None, description="The largest number.")
    step: Number | None = Field(
        default=None, description="The distance of the numbers between, any if null."
    )
    log: bool = Field(default=False, description="Whether numbers are drawn by their logarithm.")
    first: Pair | None = Field(
        default=None, description="Between which blocks a range of layers begins."
    )
    last: Pair | None = Field(default=None, description="Between which blocks it ends.")

    @property
    def whole(self) -> bool:
        """Whether the numbers are whole ones."""
        return all(isinstance(one, int | None) for one in (self.low, self.high, self.step))

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        return {"choices": value} if isinstance(value, list | tuple) else value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The short form too."""
        return {"anyOf": [{"type": "array"}, handler(core)]}

    @model_validator(mode="after")
    def _of_one_kind(self) -> "Parameter":
        findings = list(self._contradictions())
        if findings:
            raise ContradictionError(findings)
        return self

    def _contradictions(self) -> Iterator[Finding]:
        numbers = self.low, self.high
        kinds = (self.choices is not None, any(_given(numbers)), any(_given(self._ends)))
        if sum(kinds) != 1 or (kinds[1] and None in numbers) or (kinds[2] and None in self._ends):
            message = "give a list of choices, {low: A, high: B}, or {first: [A, B], last: [C, D]}"
            yield (), message
            return
        if self.choices == ():
            yield (), "there is no choice; give at least one"
        if not kinds[1] and (self.step is not None or self.log):
            yield ("log" if self.log else "step",), "is of numbers; give low and high, or leave out"
        if self.low is not None and self.high is not None:
            if not self.low < self.high:
                yield ("high",), f"{self.high:g} is not above low ({self.low:g})"
            if self.step is not None and not 0 < self.step <= self.high - self.low:
                yield ("step",), f"{self.step:g} is no distance between low and high"
            if self.log and self.low <= 0:
                yield ("low",), f"has no logarithm, found {self.low:g}; leave log out"
            if self.log and self.step is not None:
                yield ("step",), "numbers drawn by their logarithm have none; leave one out"
        if self.first is not None and self.last is not None:
            for name, (begin, end) in (("first", self.first), ("last", self.last)):
                if begin > end:
                    yield (name,), f"{begin} is above {end}"
            if self.first[1] > self.last[0]:
                message = f"a range that begins at {self.first[1]} may not end at {self.last[0]}"
                yield ("last",), f"{message}; let first end before last begins"

    @property
    def _ends(self) -> tuple[object, object]:
        return self.first, self.last


Space: TypeAlias = dict[str, Parameter]


class Search(Section):
    """What `bake search` may change, and how long it looks."""

    trials: Count = Field(default=200, description="Settings tried by the first token.")
    startup: Count = Field(
        default=40, description="Trials drawn at random before their results guide the others."
    )
    space: Space = Field(
        default={},
        description="Keys of the recipe as `--set` names them, each with a list of choices, "
        "`{low, high, step, log}`, or for layers `{first: [a, b], last: [c, d]}`.",
    )
    alternatives: Annotated[tuple[Space, ...], Field(strict=False)] = Field(
        default=(), description="Further spaces, of which each trial takes one beside `space`."
    )
    prompts: Count = Field(
        default=32, description="Prompts of the select split at most, of each role."
    )
    kl_at_most: float = Field(
        default=0.1,
        gt=0,
        description="How far the first token of answers to general prompts may move: "
        "KL(base || steered) in nats.",
    )
    finalists: Count = Field(
        default=8, description="Trials whose answers are written in full and judged."
    )
    refine: Space = Field(
        default={},
        description="Keys with lists of choices, what is too dear for every trial: each "
        "combination of them is tried on the best finalist, and judged as finalists are.",
    )

    @model_validator(mode="after")
    def _open_keys(self) -> "Search":
        findings: list[Finding] = []
        if not self.space and not self.alternatives:
            findings.append((("space",), "nothing is open; name a key, as in edits.0.strength"))
        for number, one in enumerate(self.alternatives):
            twice = sorted(set(one) & set(self.space))
            findings += [
                (("alternatives", number, key), "is in search.space too; leave one out")
                for key in twice
            ]
        places: list[tuple[tuple[str | int, ...], Space]] = [(("space",), self.space)]
        places += [(("alternatives", n), one) for n, one in enumerate(self.alternatives)]
        for key, parameter in self.refine.items():
            if parameter.choices is None:
                findings.append((("refine", key), "give a list of choices: each of them is tried"))
        for place, space in [*places, (("refine",), self.refine)]:
            for key in space:
                if refusal := _refusal(key):
                    findings.append(((*place, key), refusal))
        if findings:
            raise ContradictionError(findings)
        return self


def _refusal(key: str) -> str:
    """Why a key may not be open; empty where it may."""
    root, _, rest = key.partition(".")
    if root == "edits" or (root == "fit" and rest in OF_THE_FIT):
        return ""
    if root == "fit":
        hint = near(rest, OF_THE_FIT) or f"; of fit there are {', '.join(OF_THE_FIT)}"
        return f"is the same in all trials, whose prompts are answered and measured once{hint}"
    return "is not searched; keys of edits and of fit are"


def _given(values: tuple[object, ...]) -> Iterator[bool]:
    return (value is not None for value in values)
