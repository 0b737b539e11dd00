"""The values inside a recipe: names, numbers within bounds, layers, lists without repeats."""

import re
from pathlib import Path
from typing import Annotated, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from bake.prompts import builtin_sets
from bake.prompts.rows import HUB, SUFFIXES
from bake.recipe.errors import near

__all__ = [
    "BY_GRADIENT",
    "FILE_TYPES",
    "FLOATS",
    "SEVERAL",
    "TENSOR_TYPES",
    "Answering",
    "Basis",
    "Commit",
    "Count",
    "Estimator",
    "FileType",
    "Language",
    "Layer",
    "Layers",
    "Name",
    "PartSize",
    "Percent",
    "Ridge",
    "Serving",
    "SetName",
    "Sites",
    "Strength",
    "TensorType",
    "Text",
    "Url",
    "Variable",
    "Variants",
]

HIGHEST_LAYER = 999  # beyond every known model; the plan checks the model's own count
HIGHEST_BASIS = 64  # directions of one layer; published ones have up to ten
RANGE = r"\s*(\d{1,9})\s*-\s*(\d{1,9})\s*"
REPOSITORY = r"[\w.-]+/[\w.-]+"
COMMIT = r"[0-9a-f]{40}"
LANGUAGE = r"any|[a-z]{2,3}(-[A-Za-z0-9]{2,8})*"
NAME = r"\w[\w.-]*"
VARIABLE = r"[A-Za-z_][A-Za-z0-9_]{0,99}"


def _layers(value: object) -> object:
    """Turn 15 and "11-17" into tuples; sort and unite what is a list of whole numbers."""
    if isinstance(value, str):
        match = re.fullmatch(RANGE, value, re.ASCII)
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


def _listed(value: object) -> object:
    """One name stands for a list of it alone."""
    return (value,) if isinstance(value, str) else value


def _distinct(items: tuple[object, ...]) -> tuple[object, ...]:
    if len(set(items)) < len(items):
        raise ValueError("each may be named once")
    return items


def _set_name(name: str) -> str:
    known = sorted(builtin_sets())
    if name.startswith(HUB):
        if not re.fullmatch(REPOSITORY, name.removeprefix(HUB)):
            raise ValueError(f"a dataset of the Hub is hub:owner/name, found {name!r}")
    elif Path(name).suffix not in SUFFIXES and name not in known:
        hint = near(name, known) or f"; there are {', '.join(known)}"
        files = ", ".join(SUFFIXES)
        raise ValueError(f"no built-in prompt set {name!r} (a file ends in {files}){hint}")
    return name


def _commit(revision: str) -> str:
    if not re.fullmatch(COMMIT, revision):
        raise ValueError(
            f"expected the 40 digits of a commit, found {revision!r}; a branch or tag may move"
        )
    return revision


def _language(code: str) -> str:
    if not re.fullmatch(LANGUAGE, code):
        raise ValueError(f"expected a language code like en or zh, or any, found {code!r}")
    return code


def _name(name: str) -> str:
    if not re.fullmatch(NAME, name):
        raise ValueError(f"a name has letters, digits, '_', '.' and '-' only, found {name!r}")
    return name


def _url(url: str) -> str:
    try:
        parts = urlsplit(url)
        # Reading the port is what checks it.
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        sound = False
    if not sound or not re.fullmatch(r"[!-~]+", url):
        raise ValueError(f"expected a URL like http://localhost:8000/v1, found {url!r}")
    if parts.username is not None:  # which no message may repeat
        raise ValueError(
            "has a name or a password, and a recipe is published; name the environment variable "
            "that holds the key in judge.key"
        )
    return url


def _variable(name: str) -> str:
    if not re.fullmatch(VARIABLE, name):
        # What does not look like a name may be the key itself, which no message may repeat.
        raise ValueError("expected the name of an environment variable, as in OPENAI_API_KEY")
    return name


def _text(pattern: str) -> WithJsonSchema:
    """What a JSON Schema says of text that a validator checks."""
    return WithJsonSchema({"type": "string", "pattern": f"^({pattern})$"})


# Names to choose from where an editor completes.
_SETS = WithJsonSchema(
    {
        "anyOf": [
            {"enum": sorted(builtin_sets())},
            {"type": "string", "pattern": rf"({'|'.join(map(re.escape, SUFFIXES))})$"},
            {"type": "string", "pattern": rf"^{HUB}{REPOSITORY}$"},
        ]
    }
)
SetName: TypeAlias = Annotated[str, AfterValidator(_set_name), _SETS]
Commit: TypeAlias = Annotated[str, AfterValidator(_commit), _text(COMMIT)]
Language: TypeAlias = Annotated[str, AfterValidator(_language), _text(LANGUAGE)]
Name: TypeAlias = Annotated[str, AfterValidator(_name), _text(NAME)]
Url: TypeAlias = Annotated[str, AfterValidator(_url), _text("https?://[!-~]+")]
Variable: TypeAlias = Annotated[str, AfterValidator(_variable), _text(VARIABLE)]
Text: TypeAlias = Annotated[str, Field(min_length=1)]
Count: TypeAlias = Annotated[int, Field(ge=1, le=1_000_000)]
Layer: TypeAlias = Annotated[int, Field(ge=0, le=HIGHEST_LAYER)]
# YAML has lists and the schema has tuples: strict everywhere but there.
_ITEMS = Field(strict=False, min_length=1)
# Before a validator turns them into tuples, for editors.
_ONE_OR_MORE: TypeAlias = Annotated[list[Layer], Field(min_length=1)]
_LAYERS: TypeAlias = Layer | Annotated[str, Field(pattern=f"^{RANGE}$")] | _ONE_OR_MORE
Layers: TypeAlias = Annotated[
    tuple[Layer, ...], _ITEMS, BeforeValidator(_layers, json_schema_input_type=_LAYERS)
]
Site: TypeAlias = Literal["attention", "mlp"]
Sites: TypeAlias = Annotated[tuple[Site, ...], _ITEMS, AfterValidator(_distinct)]
Variant: TypeAlias = Literal["plain", "norm-preserving", "projected", "affine"]
Variants: TypeAlias = Annotated[
    tuple[Variant, ...],
    _ITEMS,
    AfterValidator(_distinct),
    BeforeValidator(
        _listed, json_schema_input_type=Variant | Annotated[list[Variant], Field(min_length=1)]
    ),
]
Measured: TypeAlias = Literal["transformers", "llama.cpp"]
Answering: TypeAlias = Annotated[tuple[Measured, ...], _ITEMS, AfterValidator(_distinct)]
Runtime: TypeAlias = Literal["transformers", "llama.cpp", "ollama", "vllm", "sglang", "mlx"]
Serving: TypeAlias = Annotated[tuple[Runtime, ...], _ITEMS, AfterValidator(_distinct)]
Percent: TypeAlias = Annotated[float, Field(ge=0, le=100)]
Strength: TypeAlias = Annotated[float, Field(ge=-1000, le=1000)]
Ridge: TypeAlias = Annotated[float, Field(gt=0)]
Basis: TypeAlias = Annotated[int, Field(ge=1, le=HIGHEST_BASIS)]
Estimator: TypeAlias = Literal[
    "mean-difference",
    "rmd",
    "wrmd",
    "lda",
    "pca",
    "logistic",
    "safesteer",
    "category",
    "cosmic",
    "low-rank-mix",
    "som",
    "cone",
]
BY_GRADIENT: tuple[Estimator, ...] = ("cone", "low-rank-mix")  # By gradient, on the live model.
SEVERAL: tuple[Estimator, ...] = ("som", "cone")  # What gives `fit.basis` directions a layer.
FLOATS = ("f32", "f16", "bf16")
# What llama-quantize writes (llama.cpp's tools/quantize/quantize.cpp, `QUANT_OPTIONS`).
FILE_TYPES = (
    *("q8_0", "q6_k", "q5_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k", "q4_k_m", "q4_k_s"),
    *("q4_1", "q4_0", "q3_k", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "q2_k_s", "iq4_nl", "iq4_xs"),
    *("iq3_m", "iq3_s", "iq3_xs", "iq3_xxs", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m"),
    *("iq1_s", "tq2_0", "tq1_0", "mxfp4_moe"),
)
# The types of single matrices: ggml's.
TENSOR_TYPES = (
    *("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0"),
    *("iq4_nl", "iq4_xs", "mxfp4", "nvfp4", "q3_k", "iq3_s", "iq3_xxs", "q2_k", "iq2_s", "iq2_xs"),
    *("iq2_xxs", "iq1_m", "iq1_s", "tq2_0", "tq1_0"),
)


def _file_type(name: str) -> str:
    return _one_of(name, ("base", *FLOATS, *FILE_TYPES))


def _tensor_type(name: str) -> str:
    return _one_of(name, TENSOR_TYPES)


def _one_of(name: str, types: tuple[str, ...]) -> str:
    # llama-quantize and its users write types in capitals.
    small = name.lower()
    if small not in types:
        hint = near(name, types) or f"; there are {', '.join(types)}"
        raise ValueError(f"no type {name!r}{hint}")
    return small


def _part_size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d{0,5}[MG]", text):
        raise ValueError(f"no size {text!r}; expected a number of M or G (10^6 and 10^9 bytes)")
    return text


PartSize: TypeAlias = Annotated[str, AfterValidator(_part_size)]
FileType: TypeAlias = Annotated[str, AfterValidator(_file_type)]
TensorType: TypeAlias = Annotated[str, AfterValidator(_tensor_type)]
