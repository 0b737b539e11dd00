"""How a card puts things: tables in Markdown, rates, sets, judges."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath

from bake.evaluate import Rate
from bake.prompts.rows import HUB
from bake.recipe import PromptSource

__all__ = ["JUDGES", "set_id", "set_name", "table", "with_interval"]

JUDGES: Mapping[str, str] = {
    "keyword": "The judge is a list of phrases: it reads words, not meaning.",
    "chat": "The judge is the model {} behind a server.",
    "local": "The judge is the model {}.",
}


def set_name(source: PromptSource) -> str:
    """The sets that figures are of, without the folders of whoever baked."""
    names = [one.set for one in source.sets if one.reported]
    return "+".join(
        name.removeprefix(HUB) if name.startswith(HUB) else PurePath(name).name for name in names
    )


def set_id(source: PromptSource) -> str:
    """A Hub dataset's id; what is none must not look like one."""
    name = set_name(source)
    return name if source.set.startswith(HUB) and not source.also else f"bake-{name}"


def with_interval(rate: Rate) -> str:
    """A rate with its 95 % interval."""
    low, high = rate.interval
    return f"{rate}, {low:.0f} to {high:.0f} %"


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of cells as a table; the first is its head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
