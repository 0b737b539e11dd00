"""Pages of the documentation that are written by what they describe (see mkdocs.yml).

`index.md` is the README, `recipe.md` the schema of recipes, and `architectures.md` the table of
`bake/archs.py`, so none of them can say something else than the code.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bake.arch import Arch, Block
from bake.archs import ARCHS
from bake.recipe.json_schema import recipe_json_schema

ROOT = Path(__file__).parent.parent
RUNTIMES = ("transformers", "llama.cpp", "ollama", "vllm", "sglang", "mlx")
KINDS = {"string": "text", "boolean": "true or false", "integer": "whole number"}
BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def moved(page: str) -> str:
    """A page of the repository's root as one of the site's: its links begin in docs/."""
    return re.sub(r"\]\((?:docs/)?(CONTRIBUTING|CHANGELOG|[\w-]+)\.md", _named, page)


def _named(link: re.Match[str]) -> str:
    return f"]({link[1].lower() if link[1].isupper() else link[1]}.md"


def recipe_page(schema: Mapping[str, Any]) -> str:
    """Every section and key of a recipe: what it takes, its default, its meaning."""
    lines = [
        "# Recipe reference",
        "",
        "A recipe is a YAML file. Unknown keys, and values of another kind, are errors with their",
        "place; `--set PATH=VALUE` changes any of them, and `bake schema` prints the JSON Schema",
        "that this page is made of.",
        "",
        *_keys(schema, schema["$defs"]),
    ]
    for name, section in sorted(schema["$defs"].items()):
        # One with a short form is the choice between that and its mapping.
        full = next((one for one in section.get("anyOf", ()) if "properties" in one), section)
        lines += ["", f"## {name}", "", full.get("description", ""), ""]
        lines += _keys(full, schema["$defs"])
    return "\n".join(lines) + "\n"


def _keys(section: Mapping[str, Any], sections: Mapping[str, Any]) -> list[str]:
    rows = ["| key | takes | default | |", "|---|---|---|---|"]
    for key, field in section["properties"].items():
        required = key in section.get("required", ()) or "default" not in field
        default = "" if required else _value(field["default"])
        # Pydantic leaves out what the section itself says in the same words.
        named = sections.get(field.get("$ref", "").rpartition("/")[2], {})
        meaning = field.get("description", named.get("description", ""))
        cells = (f"`{key}`", _takes(field), default, meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def _takes(field: Mapping[str, Any]) -> str:
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf"):
        if several in field:
            return " or ".join(dict.fromkeys(_takes(one) for one in field[several]))
    if "const" in field:
        return _value(field["const"])
    if "enum" in field:
        return ", ".join(map(_value, field["enum"]))
    if "prefixItems" in field:
        return " and ".join(map(_takes, field["prefixItems"]))
    kind = field.get("type", "any value")
    if kind == "array":
        return f"a list of {_takes(field.get('items', {}))}"
    if kind == "object":
        return f"a mapping to {_takes(field.get('additionalProperties', {}))}"
    bounds = (f"{words} {field[key]}" for key, words in BOUNDS.items() if key in field)
    return " ".join([KINDS.get(kind, kind), *bounds])


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return "as below"
    words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"`{words}`" if words else ""


def architecture_page(rows: Iterable[Arch]) -> str:
    """What each model type allows, and which runtimes have a slot for a bias."""
    lines = [
        *("---", "hide: [toc]", "---"),
        "# Architectures",
        "",
        "One row of `bake/archs.py` each. A writer is a matrix that adds to the residual stream:",
        "`ablate` edits all of them, `gate` those that every token passes. A bias is listed where",
        "the stock class loads and adds one, with the runtimes that do. In multimodal checkpoints",
        "the text model inside is edited.",
        "",
        "| model type | writers | post-norms | bias | inserted block |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda one: one.model_type):
        writers = [one for branch in row.branches for one in branch.writers]
        norms = [branch.norm for branch in row.branches if branch.norm]
        slots = [f"`{one.module}`: {_served(one.bias.runtimes)}" for one in writers if one.bias]
        cells = (
            f"`{row.model_type}`",
            _list(f"`{one.module}`" for one in writers),
            _list(f"`{norm}`" for norm in norms),
            _list(slots),
            _block(row.block),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _served(runtimes: Iterable[str]) -> str:
    known = [name for name in RUNTIMES if name in set(runtimes)]
    return "all runtimes" if len(known) == len(RUNTIMES) else ", ".join(known)


def _block(block: Block | str) -> str:
    if isinstance(block, str):
        return f"none: {block}"
    reasons = dict.fromkeys(why for _, why in block.unserved)
    return _list(["yes", *(f"not in {_refusing(block, why)}, which {why}" for why in reasons)])


def _refusing(block: Block, reason: str) -> str:
    return " and ".join(name for name, why in block.unserved if why == reason)


def _list(parts: Iterable[str]) -> str:
    return "<br>".join(parts)


def main() -> None:
    """Write the pages into the site that is being built."""
    import mkdocs_gen_files

    pages = {
        "index.md": moved((ROOT / "README.md").read_text(encoding="utf-8")),
        "contributing.md": moved((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")),
        "changelog.md": moved((ROOT / "CHANGELOG.md").read_text(encoding="utf-8")),
        "recipe.md": recipe_page(recipe_json_schema()),
        "architectures.md": architecture_page(ARCHS.values()),
    }
    for name, text in pages.items():
        with mkdocs_gen_files.open(name, "w") as page:
            page.write(text)


if __name__ == "<run_path>":  # how mkdocs-gen-files runs it
    main()
