"""Prompt sets: the built-in ones and the user's, and their splits by topic.

A set is a .jsonl, .csv or .parquet file, or a dataset of the Hub (`hub:owner/name`), with one
prompt a row: `text`, and where they are known `topic`, `language` and anything else; or a
.txt file with one prompt a line. The built-in sets are the .jsonl files of this folder.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path

from bake.errors import PromptError
from bake.prompts.near import plain, repeated
from bake.prompts.rows import FIRST, HUB, SUFFIXES, Place, read_rows

__all__ = [
    "Place",
    "Prompt",
    "Splits",
    "builtin_sets",
    "fingerprint",
    "load_prompts",
    "load_splits",
    "split",
    "united",
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
    take the first n where fewer are wanted. `removed` counts the prompts that were left out
    because an earlier split has nearly the same.
    """

    fit: tuple[Prompt, ...]
    select: tuple[Prompt, ...]
    test: tuple[Prompt, ...]
    removed: int = 0


def builtin_sets() -> dict[str, Path]:
    """Return the files of the built-in sets by name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.jsonl"))}


def load_prompts(source: str, *, language: str = "en", place: Place = FIRST) -> tuple[Prompt, ...]:
    """Read the prompts of a set, in one language (or `any`), in its order.

    `place` says which columns hold what, and which part of a Hub dataset is meant. A line
    that names no language counts as being in the one that is asked for; one that
    names no topic is a topic of its own. Raises PromptError, with `file:line` where a line
    is at fault. To split by topic use `load_splits`: a topic of a single language must
    land in the same split as it does in all of them.

    >>> load_prompts("political", language="es")[0].topic
    'tiananmen-1989'
    """
    name = _found(source)
    return _in_language(_read(name, language, place), language, name)


def load_splits(
    source: str, *, language: str = "en", limit: int | None = None, place: Place = FIRST
) -> Splits:
    """Read a set, split all of it by topic, then keep one language and `limit` a split."""
    name = _found(source)
    parts = split(_read(name, language, place))
    return Splits(
        _in_language(parts.fit, language, f"{name}, fit split")[:limit],
        _in_language(parts.select, language, f"{name}, select split")[:limit],
        _in_language(parts.test, language, f"{name}, test split")[:limit],
        parts.removed,
    )


def split(prompts: Sequence[Prompt], limit: int | None = None) -> Splits:
    """Deal prompts into fit, select and test: 55 %, 10 % and 35 % of the topics.

    Topics are ranked by the SHA-256 of their names, so further prompts of a known topic
    move nothing. A prompt of which an earlier split has a near duplicate is left out of
    the later one. Raises PromptError for fewer than three topics.
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
    dealt = (
        _dealt([topics[topic] for topic in ranked[:fit]]),
        _dealt([topics[topic] for topic in ranked[fit : fit + select]]),
        _dealt([topics[topic] for topic in ranked[fit + select :]]),
    )
    twins = repeated([[prompt.text for prompt in part] for part in dealt])
    fitted, selected, tested = (
        tuple(prompt for place, prompt in enumerate(part) if place not in found)[:limit]
        for part, found in zip(dealt, twins, strict=True)
    )
    return Splits(fitted, selected, tested, sum(map(len, twins)))


def united(
    sets: Sequence[Splits],
    fitted: Sequence[Sequence[Prompt]] = (),
    selected: Sequence[Sequence[Prompt]] = (),
) -> Splits:
    """The splits of several sets that are one class, a prompt of each set in turn.

    Every prompt stays in the split that its own set has it in. What an earlier split has in the
    same topic or nearly the same words, from any of the sets, is left out of the later one.
    Prompts of `fitted` are all to fit on, and those of `selected` to choose by, but for those that
    stand so in another split.
    Raises PromptError where that leaves a split empty.
    """
    if len(sets) == 1 and not fitted and not selected:
        return sets[0]
    dealt = [_dealt([getattr(one, part) for one in sets]) for part in ("fit", "select", "test")]
    fit, select, test = _apart(dealt)
    fit = _dealt([fit, _apart([(*select, *test), _dealt(fitted)])[1]])
    select = _dealt([select, _apart([(*fit, *test), _dealt(selected)])[1]])
    for name, part in (("fit", fit), ("select", select), ("test", test)):
        if not part:
            origin = sets[-1].fit[0].origin.rpartition(":")[0]
            raise PromptError(
                f"{origin}: its topics are those of the sets before it, so no prompt is left to "
                f"{name}; leave it out, or name its topics otherwise"
            )
    given = sum(map(len, (*dealt, *fitted, *selected)))
    left_out = given - len(fit) - len(select) - len(test) + sum(one.removed for one in sets)
    return Splits(fit, select, test, left_out)


def fingerprint(prompts: Iterable[Prompt]) -> str:
    """Return the SHA-256 of prompts in their order, as hexadecimal text; origins do not count."""
    digest = sha256()
    for prompt in prompts:
        fields = [prompt.text, prompt.topic, prompt.language, dict(prompt.extra)]
        digest.update(json.dumps(fields, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _found(source: str) -> str:
    """The path of a built-in set or file, or the Hub's name as it is."""
    if source.startswith(HUB) or Path(source).suffix in SUFFIXES:
        return source
    known = builtin_sets()
    if source not in known:
        matches = get_close_matches(source, known, n=1)
        hint = f"did you mean {matches[0]!r}?" if matches else f"there are {', '.join(known)}"
        raise PromptError(
            f"{source}: no built-in prompt set of that name (a file ends in "
            f"{', '.join(SUFFIXES)}); {hint}"
        )
    return str(known[source])


def _read(name: str, language: str, place: Place) -> tuple[Prompt, ...]:
    found = []
    for origin, row in read_rows(name, place):
        values = dict(row)
        text = str(values.pop("text"))
        topic = str(values.pop("topic", "")) or _own_topic(text)
        spoken = str(values.pop("language", language))
        found.append(Prompt(text, topic, spoken, values, origin))
    return tuple(found)


def _own_topic(text: str) -> str:
    return _digest(plain(text))[:16]


def _in_language(prompts: tuple[Prompt, ...], language: str, where: str) -> tuple[Prompt, ...]:
    kept = tuple(prompt for prompt in prompts if language in ("any", prompt.language))
    if not kept:
        languages = ", ".join(sorted({prompt.language for prompt in prompts}))
        found = f"none in language {language!r}, only in {languages}" if prompts else "none"
        raise PromptError(f"{where}: expected prompts, found {found}")
    return kept


def _apart(parts: Sequence[Sequence[Prompt]]) -> list[tuple[Prompt, ...]]:
    """The parts without what one before them has in the same topic or nearly the same words."""
    twins = repeated([[prompt.text for prompt in part] for part in parts])
    topics: set[str] = set()
    kept = []
    for part, found in zip(parts, twins, strict=True):
        kept.append(
            tuple(
                prompt
                for place, prompt in enumerate(part)
                if place not in found and prompt.topic not in topics
            )
        )
        topics |= {prompt.topic for prompt in part}
    return kept


def _dealt(parts: Sequence[Sequence[Prompt]]) -> tuple[Prompt, ...]:
    """One prompt of each part (a topic, a set), then a second of each, and so on."""
    rounds = zip_longest(*parts)
    return tuple(prompt for dealt in rounds for prompt in dealt if prompt is not None)


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _share(count: int, percent: int) -> int:
    return (count * percent + 50) // 100
