"""Prompt sets: the built-in ones and the user's, and their splits by topic.

A set is a .jsonl file with one object a line: `text`, and where they are known `topic`,
`language` and anything else; or a .txt file with one prompt a line. The built-in sets are
the .jsonl files of this folder.
"""

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path

from bake.errors import PromptError

__all__ = [
    "Prompt",
    "Splits",
    "builtin_sets",
    "fingerprint",
    "load_prompts",
    "load_splits",
    "split",
]


@dataclass(frozen=True)
class Prompt:
    """One prompt; prompts of one topic never stand in two splits.

    `extra` holds the other keys of its line, `origin` its place as `file:line`.
    """

    text: str
    topic: str
    language: str
    extra: Mapping[str, object] = field(default_factory=dict, hash=False)
    origin: str = field(default="", compare=False)


@dataclass(frozen=True)
class Splits:
    """Prompts to fit on, to choose settings by, and to report; no topic is in two of them.

    Each is dealt from its topics in turn, so every beginning of it is balanced by topic:
    take the first n where fewer are wanted.
    """

    fit: tuple[Prompt, ...]
    select: tuple[Prompt, ...]
    test: tuple[Prompt, ...]


def builtin_sets() -> dict[str, Path]:
    """Return the files of the built-in sets by name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.jsonl"))}


def load_prompts(source: str, *, language: str = "en") -> tuple[Prompt, ...]:
    """Read the prompts of a built-in set or a file, in one language (or `any`), in file order.

    A line that names no language counts as being in the one that is asked for; one that
    names no topic is a topic of its own. Raises PromptError, with `file:line` where a line
    is at fault. To split by topic use `load_splits`: a topic of a single language must
    land in the same split as it does in all of them.

    >>> load_prompts("political", language="es")[0].topic
    'tiananmen-1989'
    """
    path = _path(source)
    return _in_language(_read(path, language), language, str(path))


def load_splits(source: str, *, language: str = "en", limit: int | None = None) -> Splits:
    """Read a set, split all of it by topic, then keep one language and `limit` a split."""
    path = _path(source)
    parts = split(_read(path, language))
    return Splits(
        _in_language(parts.fit, language, f"{path}, fit split")[:limit],
        _in_language(parts.select, language, f"{path}, select split")[:limit],
        _in_language(parts.test, language, f"{path}, test split")[:limit],
    )


def split(prompts: Sequence[Prompt], limit: int | None = None) -> Splits:
    """Deal prompts into fit, select and test: 55 %, 10 % and 35 % of the topics.

    Topics are ranked by the SHA-256 of their names, so further prompts of a known topic
    move nothing. Raises PromptError for fewer than three topics, and for the same text
    (but for case, spacing and punctuation) in two splits.
    """
    topics: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        topics.setdefault(prompt.topic, []).append(prompt)
    ranked = sorted(topics, key=_digest)
    if len(ranked) < 3:
        where = f"{prompts[0].origin.rpartition(':')[0]}: " if prompts else ""
        message = f"three splits need prompts of at least 3 topics, found {len(ranked)}"
        raise PromptError(f"{where}{message}")
    select = max(1, _share(len(ranked), 10))
    test = max(1, _share(len(ranked), 35))
    fit = len(ranked) - select - test
    parts = Splits(
        _dealt([topics[topic] for topic in ranked[:fit]]),
        _dealt([topics[topic] for topic in ranked[fit : fit + select]]),
        _dealt([topics[topic] for topic in ranked[fit + select :]]),
    )
    _check_apart(parts)
    return Splits(parts.fit[:limit], parts.select[:limit], parts.test[:limit])


def fingerprint(prompts: Iterable[Prompt]) -> str:
    """Return the SHA-256 of prompts in their order, as hexadecimal text; origins do not count."""
    digest = sha256()
    for prompt in prompts:
        fields = [prompt.text, prompt.topic, prompt.language, dict(prompt.extra)]
        digest.update(json.dumps(fields, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _path(source: str) -> Path:
    path = Path(source)
    if path.suffix in {".jsonl", ".txt"}:
        return path
    known = builtin_sets()
    if source not in known:
        matches = get_close_matches(source, known, n=1)
        hint = f"did you mean {matches[0]!r}?" if matches else f"there are {', '.join(known)}"
        raise PromptError(
            f"{source}: no built-in prompt set of that name (a file ends in .jsonl or .txt); {hint}"
        )
    return known[source]


def _read(path: Path, language: str) -> tuple[Prompt, ...]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise PromptError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise PromptError(f"{path}:{line}: this is not UTF-8 text") from error
    read = _json_line if path.suffix == ".jsonl" else _text_line
    return tuple(
        read(line.strip(), language, f"{path}:{number}")
        # Not splitlines: JSON may hold U+2028 and its like unescaped.
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    )


def _json_line(line: str, language: str, origin: str) -> Prompt:
    try:
        values = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise PromptError(f"{origin}: not valid JSON: {reason}") from error
    if not isinstance(values, dict):
        raise PromptError(f'{origin}: expected an object like {{"text": "..."}}')
    if "text" not in values:
        raise PromptError(f"{origin}: the key 'text' is missing")
    for key in ("text", "topic", "language"):
        value = values.get(key, "unknown")
        if not isinstance(value, str) or not value.strip():
            raise PromptError(f"{origin}: {key!r} must be text that is not empty")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise PromptError(f"{origin}: {key!r} holds half of a surrogate pair")
    text = values.pop("text")
    topic = values.pop("topic", None) or _own_topic(text)
    return Prompt(text, topic, values.pop("language", language), values, origin)


def _text_line(line: str, language: str, origin: str) -> Prompt:
    return Prompt(line, _own_topic(line), language, {}, origin)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _own_topic(text: str) -> str:
    return _digest(_plain(text))[:16]


def _in_language(prompts: tuple[Prompt, ...], language: str, where: str) -> tuple[Prompt, ...]:
    kept = tuple(prompt for prompt in prompts if language in ("any", prompt.language))
    if not kept:
        languages = ", ".join(sorted({prompt.language for prompt in prompts}))
        found = f"none in language {language!r}, only in {languages}" if prompts else "none"
        raise PromptError(f"{where}: expected prompts, found {found}")
    return kept


def _dealt(topics: list[list[Prompt]]) -> tuple[Prompt, ...]:
    """One prompt of each topic, then a second of each, and so on."""
    rounds = zip_longest(*topics)
    return tuple(prompt for dealt in rounds for prompt in dealt if prompt is not None)


def _check_apart(parts: Splits) -> None:
    first: dict[str, tuple[str, Prompt]] = {}
    clashes: list[str] = []
    for name, prompts in (("fit", parts.fit), ("select", parts.select), ("test", parts.test)):
        for prompt in prompts:
            other, twin = first.setdefault(_plain(prompt.text), (name, prompt))
            if other != name:
                here = f"{prompt.origin or repr(prompt.text)} ({name}, topic {prompt.topic!r})"
                there = f"{twin.origin or repr(twin.text)} ({other}, topic {twin.topic!r})"
                clashes.append(f"{here}: the same prompt as {there}; give both one topic")
    if clashes:
        more = [f"and {len(clashes) - 10} more"] if len(clashes) > 10 else []
        raise PromptError("\n".join(clashes[:10] + more))


def _plain(text: str) -> str:
    """Text without what makes no other prompt: case, spacing, punctuation, character widths."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    marks = "".join(" " if unicodedata.category(c)[0] in "CPZ" else c for c in folded)
    return " ".join(marks.split()) or text


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _share(count: int, percent: int) -> int:
    return (count * percent + 50) // 100
