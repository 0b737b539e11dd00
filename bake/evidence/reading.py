"""A file of JSON as values: checked as it is read, and what is wrong with it in one line."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from bake.errors import InputError

__all__ = ["Read", "check_model", "json_of", "parsed"]


class Read(BaseModel):
    """A part of a file; what nobody reads of it is passed over."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=Read)


def json_of(path: Path, source: str) -> Any:
    """A file as plain values; raises InputError, which names the command that writes such."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror}; give a file of `{source}`"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON; run `{source}` again") from error


def parsed(
    kind: type[Model],
    found: Any,
    place: Path | str,
    remedy: str = "bake the recipe again",
    failure: type[InputError] = InputError,
) -> Model:
    """Plain values as what they should be; raises `failure`, which names the first wrong key."""
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise failure(f"{place}: {key}: {_reason(first['msg'])}; {remedy}") from error


def _reason(message: str) -> str:
    """pydantic's words as the second half of a line."""
    text = message.removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def check_model(path: Path, theirs: str, ours: str) -> None:
    """Refuse a file that is of another model than the bake; raises InputError."""
    if theirs != ours:
        raise InputError(
            f"{path}: model: is of {theirs!r} and the bake of {ours!r}; give a file of the same "
            "model"
        )
