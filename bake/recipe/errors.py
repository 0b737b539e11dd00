"""What pydantic found wrong, in plain words and with the path that the user wrote."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

__all__ = ["ContradictionError", "explain", "near"]

Path = tuple[str | int, ...]


class ContradictionError(ValueError):
    """Fields that are right one by one and wrong together: pairs of a path and a message."""

    def __init__(self, findings: Sequence[tuple[Path, str]]) -> None:
        super().__init__("; ".join(f"{_dotted(path)}: {message}" for path, message in findings))
        self.findings = tuple(findings)


def explain(error: ValidationError, schema: type[BaseModel]) -> Iterator[tuple[Path, str, bool]]:
    """Yield path, message, and whether the key (not its value) is what is wrong."""
    for detail in error.errors(include_url=False):
        path, model = _resolve(schema, detail["loc"])
        context = detail.get("ctx", {})
        cause = context.get("error")
        if isinstance(cause, ContradictionError):
            yield from ((path + inner, message, False) for inner, message in cause.findings)
        elif detail["type"] == "extra_forbidden":
            yield path, _unknown(str(path[-1]), model), True
        elif detail["type"] == "too_short" and detail["input"]:
            continue  # pydantic counts the items without mistakes; theirs are reported
        elif detail["type"].startswith("union_tag"):
            yield (*path, "op"), _operator(detail, model), False
        else:
            yield path, _message(detail, context), False


def near(word: str, choices: Sequence[str]) -> str:
    """Return "; did you mean 'x'?" for the closest choice, or nothing."""
    matches = get_close_matches(word.casefold(), choices, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


_KINDS = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "model_attributes_type": "a mapping",
    "model_type": "a mapping",
    "string_type": "text",
    "tuple_type": "a list",
}
_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def _message(detail: ErrorDetails, context: Mapping[str, Any]) -> str:
    kind, value = detail["type"], detail["input"]
    if kind == "missing":
        return "this key is required"
    if kind == "literal_error":
        choices = str(context["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        hint = near(value, choices) if isinstance(value, str) else ""
        return f"expected {_either(choices)}, found {_found(value)}{hint}"
    if kind in _KINDS:
        return f"expected {_KINDS[kind]}, found {_found(value)}"
    if kind in _BOUNDS:
        words, limit = _BOUNDS[kind]
        return f"expected {words} {str(context[limit]).removesuffix('.0')}, found {_found(value)}"
    if kind == "finite_number":
        return f"expected a finite number, found {_found(value)}"
    if kind == "too_short":
        return "expected at least one item, found none"
    if kind == "string_too_short":
        return "expected text, found none"
    if kind == "value_error":
        return str(context["error"])
    return detail["msg"][:1].lower() + detail["msg"][1:]


def _unknown(key: str, model: type[BaseModel]) -> str:
    keys = list(model.model_fields)
    hint = near(key, keys) or f"; the keys here are {', '.join(keys)}"
    return f"unknown key {key!r}{hint}"


def _operator(detail: ErrorDetails, model: type[BaseModel]) -> str:
    choices = [_tag(choice) for choice in _models_in(model.model_fields["edits"].annotation)]
    given = detail["input"].get("op") if isinstance(detail["input"], dict) else None
    if given is None:
        return f"this key is required: {_either(choices)}"
    hint = near(given, choices) if isinstance(given, str) else ""
    return f"expected {_either(choices)}, found {_found(given)}{hint}"


def _found(value: object) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"text {value if len(value) <= 40 else value[:39] + '…'!r}"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return "a huge number" if isinstance(value, int) and abs(value) > 10**20 else str(value)


def _either(choices: Sequence[str]) -> str:
    return " or ".join([", ".join(choices[:-1]), choices[-1]] if choices[1:] else choices)


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def _resolve(schema: type[BaseModel], location: Path) -> tuple[Path, type[BaseModel]]:
    """Take the tags of discriminated unions out of a location; return the innermost model too.

    pydantic reports ("edits", 0, "gate", "layers") for what the user wrote at edits.0.layers.
    """
    path: list[str | int] = []
    model, choices = schema, [schema]
    for step in location:
        if len(choices) > 1 and isinstance(step, str):
            choices = [choice for choice in choices if _tag(choice) == step]
            model = choices[0]
            continue
        path.append(step)
        if isinstance(step, str) and choices:
            model = choices[0]
            field = model.model_fields.get(step)
            choices = _models_in(field.annotation) if field else []
    return tuple(path), model


def _models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _tag(model: type[BaseModel]) -> str:
    return str(get_args(model.model_fields["op"].annotation)[0])
