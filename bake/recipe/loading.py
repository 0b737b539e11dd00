"""A recipe's file: found, read, changed by options, and every mistake with its place."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from bake.errors import RecipeError
from bake.recipe.errors import explain, near
from bake.recipe.schema import Recipe
from bake.recipe.yaml import Document, Problem, parse, with_value

__all__ = ["LoadedRecipe", "ShippedRecipe", "load_recipe", "restore_recipe", "shipped_recipes"]

Location = tuple[str | int, ...]


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, and where it came from: what the manifest records.

    `source` is the path as given, or the file name of a shipped recipe; `text` is the file,
    character for character; `overrides` are the changes on top, as the user would type them,
    but for `--output`.
    """

    recipe: Recipe
    text: str
    source: str
    overrides: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """SHA-256 of the JSON list of the text and of the list of overrides (`json.dumps`)."""
        stated = json.dumps([self.text, list(self.overrides)])
        return hashlib.sha256(stated.encode()).hexdigest()


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe that travels with bake; the description is the first comment of its file."""

    name: str
    path: Path
    description: str


def load_recipe(
    source: str,
    *,
    overrides: Sequence[str] = (),
    model: str | None = None,
    output: str | None = None,
) -> LoadedRecipe:
    """Read a recipe from a path, or from the name of a shipped one with or without .yaml.

    A file that exists wins over a shipped name. Overrides are `key.path=value`, the value in
    YAML, items of lists by their index; later ones win, then `model` and `output`. Paths
    inside a recipe are relative to the current folder. Raises RecipeError, which names every
    mistake on a line of its own.

    >>> load_recipe("political-open", overrides=["edits.0.strength=-3"]).recipe.model
    'demo'
    """
    path, label = _find(source)
    return _loaded(_text(path, label), label, label, _options(overrides, model, output))


def restore_recipe(
    text: str, source: str, overrides: Sequence[str], place: str, output: str | None = None
) -> LoadedRecipe:
    """The recipe that a `LoadedRecipe` with these fields held; `place` is where they stand.

    Raises RecipeError as `load_recipe` does, and for an override that is none.
    """
    options = []
    for override in overrides:
        name, _, rest = override.removeprefix("--").partition(" ")
        if name not in ("set", "model") or not override.startswith("--"):
            raise RecipeError(f"{place}: overrides: expected --set or --model, found {override!r}")
        key, equals, value = rest.partition("=") if name == "set" else ("model", "=", rest)
        options.append(_Option(name, key, value if equals else None))
    if output is not None:
        options.append(_Option("output", "output", output))
    return _loaded(text, source, f"{place}: {source}", options)


def _loaded(text: str, source: str, label: str, options: Sequence["_Option"]) -> LoadedRecipe:
    """Parse and check a recipe; `label` stands in front of what is wrong in its text."""
    document = parse(text)
    if not isinstance(document.value, dict):
        message = "the recipe is empty" if document.root is None else _NOT_A_MAPPING
        wrong = Problem(*document.locate(()), "", message)
        raise RecipeError(_report(label, document.problems or (wrong,), ()))

    values: object = {"name": _name_from(Path(source)), **document.value}
    changed: dict[Location, _Option] = {}
    refused: list[str] = []
    for option in options:
        try:
            values, location = with_value(values, option.keys(), option.parsed())
            changed[location] = option
        except ValueError as error:
            refused.append(f"{option.title()}: {error}")
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems = list(document.problems)
        unreadable = {(problem.line, problem.column) for problem in problems}
        for location, message, at_key in explain(error, Recipe):
            if cause := _cause(location, changed, document):
                refused.append(f"{cause.title(location)}: {message}")
            else:
                place = document.locate(location, key=at_key)
                # Where YAML already found a mistake, its value is missing: one line is enough.
                if place not in unreadable:
                    problems.append(Problem(*place, _dotted(location), message))
        raise RecipeError(_report(label, problems, refused)) from error
    if document.problems or refused:
        raise RecipeError(_report(label, document.problems, refused))
    # Where the result goes changes nothing of what it is.
    kept = tuple(str(option) for option in options if option.name != "output")
    return LoadedRecipe(recipe, text, source, kept)


def shipped_recipes() -> list[ShippedRecipe]:
    """Return the recipes that travel with bake, by name."""
    return [
        ShippedRecipe(path.stem, path, _first_comment(path))
        for path in sorted(_shipped_folder().glob("*.yaml"))
    ]


_NOT_A_MAPPING = "expected keys and values, `key: value`"


@dataclass(frozen=True)
class _Option:
    """A change on top of a file: `--set key=value`, or `--model value`, whose value is text."""

    name: str
    key: str
    value: str | None

    def __str__(self) -> str:
        return (
            f"--set {self.key}={self.value}"
            if self.name == "set"
            else f"--{self.name} {self.value}"
        )

    def title(self, location: Location = ()) -> str:
        """The option as errors name it: with the path inside its value, where there is one."""
        if self.name != "set":
            return f"--{self.name}"
        dotted = _dotted(location)
        longest = dotted if len(dotted) > len(self.key) else self.key
        return f"--set {longest}" if longest else str(self)

    def keys(self) -> list[str]:
        keys = self.key.split(".")
        if self.value is None or not all(keys):
            raise ValueError("expected key.path=value")
        return keys

    def parsed(self) -> object:
        if self.name != "set" or self.value is None:
            return self.value
        document = parse(self.value)
        if document.problems:
            raise ValueError(document.problems[0].message)
        return document.value


def _options(overrides: Sequence[str], model: str | None, output: str | None) -> list[_Option]:
    options = []
    for override in overrides:
        key, equals, value = override.partition("=")
        options.append(_Option("set", key.strip(), value if equals else None))
    named = (("model", model), ("output", output))
    return options + [_Option(name, name, value) for name, value in named if value is not None]


def _cause(
    location: Location, changed: Mapping[Location, _Option], document: Document
) -> _Option | None:
    """Return the option that an error is about: one that wrote there, or made the way there."""
    for changed_at, option in reversed(tuple(changed.items())):
        written = location[: len(changed_at)] == changed_at
        made = changed_at[: len(location)] == location and not document.holds(location)
        if written or (made and location):
            return option
    return None


def _find(source: str) -> tuple[Path, str]:
    """Return the file of a recipe, and the name that messages and the manifest use."""
    path = Path(source)
    try:
        if path.exists() and not path.is_dir():
            return path, source
    except OSError as error:
        raise RecipeError(f"{source}: cannot be read: {error.strerror}") from error
    # A folder does not hide a shipped name: bake's own output has the recipe's name.
    shipped = {recipe.name: recipe.path for recipe in shipped_recipes()}
    name = source.removesuffix(".yaml")
    if name in shipped:
        return shipped[name], shipped[name].name
    if path.is_dir():
        raise RecipeError(f"{source}: this is a folder; a recipe is a YAML file")
    hint = near(path.stem, list(shipped)) or f"; shipped recipes: {', '.join(shipped) or 'none'}"
    raise RecipeError(f"{source}: no such file, and no shipped recipe of that name{hint}")


def _text(path: Path, label: str) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{label}: cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise RecipeError(f"{label}:{line}:{column}: this is not UTF-8 text") from error


def _shipped_folder() -> Path:
    """In a wheel the recipes lie inside the package; in a checkout, beside it."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _name_from(path: Path) -> str:
    return re.sub(r"[^\w.-]+", "-", path.stem).strip("-.") or "recipe"


def _dotted(location: Location) -> str:
    return ".".join(map(str, location))


def _report(label: str, problems: Iterable[Problem], refused: Iterable[str]) -> str:
    return "\n".join([*(f"{label}:{problem}" for problem in sorted(problems)), *refused])
