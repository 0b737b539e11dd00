"""YAML text -> plain values that remember where they stood.

The scalars are those of YAML 1.2: `1e-4` is a number, `no` is text (Norwegian),
`2024-01-01` is text. PyYAML's own tables are YAML 1.1, where each is something else.
Nothing is constructed but mappings, lists, text, numbers, truth values and null.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import yaml

__all__ = ["Document", "Problem", "parse", "with_value"]

Path = tuple[str | int, ...]


@dataclass(frozen=True, order=True)
class Problem:
    """One mistake: its place counted from 1, its path of keys, and what is wrong in plain words."""

    line: int
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        path = f"{self.path}: " if self.path else ""
        return f"{self.line}:{self.column}: {path}{self.message}"


@dataclass(frozen=True)
class Document:
    """A text's value, and the mistakes that YAML alone can see; `root` is None if it is empty."""

    value: object
    root: yaml.Node | None
    problems: tuple[Problem, ...]

    def locate(self, path: Path, *, key: bool = False) -> tuple[int, int]:
        """Return line and column of the value at `path`, or of its key.

        Where the path leaves the text (a missing key, a default), the last place on the way.
        """
        mark = self._walk(path, key)[0]
        return (mark.line + 1, mark.column + 1) if mark else (1, 1)

    def holds(self, path: Path) -> bool:
        """Return whether the text itself has a value at `path`."""
        return self._walk(path, key=False)[1]

    def _walk(self, path: Path, key: bool) -> tuple[yaml.Mark | None, bool]:
        node = self.root
        mark = node.start_mark if node else None
        for step in path:
            found: tuple[yaml.Node, yaml.Node] | None = None
            if isinstance(node, yaml.MappingNode):
                # The first of two equal keys counts, as it does for the value.
                found = next((pair for pair in node.value if pair[0].value == step), None)
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
                found = (node.value[step],) * 2 if step < len(node.value) else None
            if found is None:
                return mark, False
            node = found[1]
            mark = (found[0] if key else node).start_mark
        return mark, True


def parse(text: str) -> Document:
    """Read one YAML document; a syntax error is a problem of the document, not an exception."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        parts = [part for part in (error.context, error.problem) if part]
        problem = Problem(*place, "", f"not valid YAML: {', '.join(parts)}")
        return Document(None, None, (problem,))
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = (before.count("\n") + 1, len(before) - before.rfind("\n"))
        message = f"the character U+{ord(text[error.position]):04X} is not allowed in YAML"
        return Document(None, None, (Problem(*place, "", message),))
    except RecursionError:
        return Document(None, None, (Problem(1, 1, "", "nested too deeply"),))
    if root is None:
        return Document(None, None, ())
    reader = _Reader()
    value = reader.read(root, ())
    return Document(value, root, tuple(reader.problems))


def with_value(values: object, path: Sequence[str], value: object) -> tuple[object, Path]:
    """Return `values` with `value` at a path of keys and list indices, and the path resolved.

    Mappings on the way that are missing or null are made. Raises ValueError, in plain
    words, where the path cannot be followed.
    """
    return _with_value(values, tuple(path), value, ())


def _with_value(
    holder: object, path: tuple[str, ...], value: object, done: Path
) -> tuple[object, Path]:
    if not path:
        return value, done
    step, rest = path[0], path[1:]
    here = ".".join(map(str, done))
    if isinstance(holder, list):
        if not (step.isascii() and step.isdecimal() and int(step) < len(holder)):
            raise ValueError(f"no item {step!r} in {here}; the last is {len(holder) - 1}")
        index = int(step)
        child, resolved = _with_value(holder[index], rest, value, (*done, index))
        return [*holder[:index], child, *holder[index + 1 :]], resolved
    if isinstance(holder, str) and len(done) == 2 and done[0] == "prompts":
        holder = {"set": holder}  # the short form of a prompt source
    if not isinstance(holder, dict | None):
        raise ValueError(f"{here} holds no further keys")
    child, resolved = _with_value((holder or {}).get(step), rest, value, (*done, step))
    return {**(holder or {}), step: child}, resolved


_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with the core schema of YAML 1.2 (section 10.3.2)."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own name and kind)


for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(rf"^(?:{_pattern})$"), _first)


class _Reader:
    """Nodes -> values, with every problem kept on the way."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        # An alias returns its anchor's node: read once, so that nested aliases cost nothing.
        self._read: dict[int, object] = {}
        self._open: set[int] = set()

    def read(self, node: yaml.Node, path: Path) -> object:
        if id(node) in self._open:
            self._complain(node, path, "an alias may not contain itself")
            return None
        if id(node) not in self._read:
            self._open.add(id(node))
            self._read[id(node)] = self._value(node, path)
            self._open.remove(id(node))
        return self._read[id(node)]

    def _value(self, node: yaml.Node, path: Path) -> object:
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.read(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
            try:
                return _SCALARS[kind](node.value)
            except (ValueError, KeyError):
                self._complain(node, path, f"{node.value[:40]!r} cannot be read as {kind}")
                return None
        self._complain(node, path, f"the tag {kind!r} is not allowed")
        return None

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, object]:
        values: dict[str, object] = {}
        lines: dict[str, int] = {}
        for key, child in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._complain(key, path, "a key must be text")
            elif key.value in values:
                message = f"duplicate key {key.value!r}; the first is on line {lines[key.value]}"
                self._complain(key, (*path, key.value), message)
            else:
                lines[key.value] = key.start_mark.line + 1
                values[key.value] = self.read(child, (*path, key.value))
        return values

    def _complain(self, node: yaml.Node, path: Path, message: str) -> None:
        mark = node.start_mark
        dotted = ".".join(map(str, path))
        self.problems.append(Problem(mark.line + 1, mark.column + 1, dotted, message))


def _integer(text: str) -> int:
    return int(text, 0) if text[:2] in {"0o", "0x"} else int(text)


def _float(text: str) -> float:
    return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))


_SCALARS: dict[str, Callable[[str], object]] = {
    "null": lambda text: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": _integer,
    "float": _float,
    "str": str,
}
