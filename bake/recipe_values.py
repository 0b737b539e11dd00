"""The values inside a recipe: names, numbers within bounds, layers, lists without repeats."""

import re
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

from bake.prompts import builtin_sets
from bake.recipe_errors import near

__all__ = [
    "Answering",
    "Count",
    "Language",
    "Layer",
    "Layers",
    "Name",
    "Percent",
    "Ridge",
    "Serving",
    "SetName",
    "Sites",
    "Strength",
    "Text",
]

HIGHEST_LAYER = 999  # beyond every known model; the plan checks the model's own count


def _layers(value: object) -> object:
    """Turn 15 and "11-17" into tuples; sort and unite what is a list of whole numbers."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d{1,9})\s*-\s*(\d{1,9})\s*", value, re.ASCII)
        if not match:
            raise ValueError(f'expected a list of layers or a range like "11-17", found {value!r}')
        first, last = int(match[1]), int(match[2])
        if not first <= last <= HIGHEST_LAYER:
            raise ValueError(f"a range rises and ends by {HIGHEST_LAYER}, found {value!r}")
        return tuple(range(first, last + 1))
    if type(value) is int:
        return (value,)
    if isinstance(value, list | tuple) and all(type(layer) is int for layer in value):
        return tuple(sorted(set(value)))
    return value


def _distinct(items: tuple[object, ...]) -> tuple[object, ...]:
    if len(set(items)) < len(items):
        raise ValueError("each may be named once")
    return items


def _set_name(name: str) -> str:
    known = sorted(builtin_sets())
    if Path(name).suffix not in {".jsonl", ".txt"} and name not in known:
        hint = near(name, known) or f"; there are {', '.join(known)}"
        raise ValueError(f"no built-in prompt set {name!r} (a file ends in .jsonl or .txt){hint}")
    return name


def _language(code: str) -> str:
    if not re.fullmatch(r"any|[a-z]{2,3}(-[A-Za-z0-9]{2,8})*", code):
        raise ValueError(f"expected a language code like en or zh, or any, found {code!r}")
    return code


def _name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"a name has letters, digits, '_', '.' and '-' only, found {name!r}")
    return name


SetName: TypeAlias = Annotated[str, AfterValidator(_set_name)]
Language: TypeAlias = Annotated[str, AfterValidator(_language)]
Name: TypeAlias = Annotated[str, AfterValidator(_name)]
Text: TypeAlias = Annotated[str, Field(min_length=1)]
Count: TypeAlias = Annotated[int, Field(ge=1, le=1_000_000)]
Layer: TypeAlias = Annotated[int, Field(ge=0, le=HIGHEST_LAYER)]
# YAML has lists and the schema has tuples: strict everywhere but there.
_ITEMS = Field(strict=False, min_length=1)
Layers: TypeAlias = Annotated[tuple[Layer, ...], _ITEMS, BeforeValidator(_layers)]
Site: TypeAlias = Literal["attention", "mlp"]
Sites: TypeAlias = Annotated[tuple[Site, ...], _ITEMS, AfterValidator(_distinct)]
Measured: TypeAlias = Literal["transformers", "llama.cpp"]
Answering: TypeAlias = Annotated[tuple[Measured, ...], _ITEMS, AfterValidator(_distinct)]
Runtime: TypeAlias = Literal["transformers", "llama.cpp", "ollama", "vllm", "sglang", "mlx"]
Serving: TypeAlias = Annotated[tuple[Runtime, ...], _ITEMS, AfterValidator(_distinct)]
Percent: TypeAlias = Annotated[float, Field(ge=0, le=100)]
Strength: TypeAlias = Annotated[float, Field(ge=-1000, le=1000)]
Ridge: TypeAlias = Annotated[float, Field(gt=0)]
