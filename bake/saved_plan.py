"""A plan as a file: made once, read by people, and applied only while it still holds.

It has the plan's own JSON, the recipe that it came from, and hashes of what it was made of:
the base's config and headers, the prompts, and a file of directions. Weights are not
hashed: a plan is made from headers alone.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake import __version__
from bake.checkpoint import Checkpoint
from bake.errors import PlanError
from bake.gguf_file import GGUFFile
from bake.manifest import file_hash
from bake.plan import Plan
from bake.recipe import LoadedRecipe, restore_recipe
from bake.staging import staged_file

__all__ = ["SavedPlan", "save_plan", "snapshot"]

FORMAT = 1
AGAIN = "make the plan again with `bake plan`"


def snapshot(
    loaded: LoadedRecipe,
    plan: Plan,
    base: Checkpoint,
    gguf: GGUFFile | None,
    prompts: Mapping[str, Mapping[str, str]],
    directions: str | None,
    probes: Mapping[str, Mapping[str, str]],
) -> dict[str, object]:
    """The plan, its recipe and the hashes of what it was made of, as plain values.

    `prompts` are the fingerprints of the splits by role, `directions` the SHA-256 of their file,
    `probes` those of the gates', by edit.
    """
    return {
        "format": FORMAT,
        "bake": __version__,
        "recipe": {
            "text": loaded.text,
            "source": loaded.source,
            "overrides": list(loaded.overrides),
        },
        "inputs": {
            "config.json": file_hash(base.folder / "config.json"),
            "headers": {shard.file.name: _shard_header(shard.file) for shard in base.shards},
            "gguf_header": _gguf_headers(gguf) if gguf else None,
            "prompts": {role: dict(parts) for role, parts in prompts.items()},
            "directions": directions,
            **({"probes": {edit: dict(one) for edit, one in probes.items()}} if probes else {}),
        },
        **plan.as_json(),
    }


def save_plan(content: Mapping[str, object], path: Path, overwrite: bool) -> None:
    """Write a snapshot; raises OutputError where the file exists."""
    with staged_file(path, overwrite) as staging:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        staging.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class SavedPlan:
    """A plan's file, and the values in it."""

    path: Path
    content: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> "SavedPlan":
        """Read a plan; raises PlanError for anything that `bake plan --output` did not write."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"{path}: cannot be read: {error.strerror}; check the path") from error
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{path}: is no plan: not valid JSON; {AGAIN}") from error
        match content:
            case {
                "format": int(version),
                "recipe": {"text": str(), "source": str(), "overrides": list(overrides)},
            } if all(isinstance(one, str) for one in overrides):
                if version != FORMAT:
                    raise PlanError(
                        f"{path}: format: is {version}, this bake reads {FORMAT}; {AGAIN}"
                    )
                return cls(path, content)
        raise PlanError(f"{path}: is no plan: recipe and format are not in it; {AGAIN}")

    def recipe(self, output: str | None = None) -> LoadedRecipe:
        """The recipe as it was loaded then; raises RecipeError where this bake reads it no more."""
        stored = self.content["recipe"]
        return restore_recipe(
            stored["text"], stored["source"], stored["overrides"], str(self.path), output
        )

    def check(self, now: Mapping[str, object]) -> None:
        """Compare with a snapshot of today; raises PlanError, which names the first difference."""
        # As the file has it: tuples are lists there.
        today = json.loads(json.dumps(now))
        # Another version of bake that plans the same is no difference.
        old, new = ({**one, "bake": None} for one in (self.content, today))
        for place, words in _differences(old, new, ()):
            where = ".".join(map(str, place))
            raise PlanError(f"{self.path}: {where}: {words} since the plan was made; {AGAIN}")


def _differences(
    old: object, new: object, place: tuple[str | int, ...]
) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Where two JSON values differ, depth first, and what happened there."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            if key not in new or key not in old:
                yield (*place, key), "is gone" if key in old else "is new"
            else:
                yield from _differences(old[key], new[key], (*place, key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, (*place, number))
    elif old != new or type(old) is not type(new):
        yield place, f"was {_short(old)} and is {_short(new)}"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _shard_header(path: Path) -> str:
    """SHA-256 of a safetensors header with its length, which `Checkpoint.open` has checked."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    return _hash_of_start(path, 8 + length)


def _gguf_headers(gguf: GGUFFile) -> str:
    """SHA-256 of a GGUF's header, or of those of all its parts."""
    digest = hashlib.sha256()
    for part in gguf.files:
        with part.path.open("rb") as stream:
            digest.update(stream.read(part.data_start))
    return digest.hexdigest()


def _hash_of_start(path: Path, length: int) -> str:
    with path.open("rb") as stream:
        return hashlib.sha256(stream.read(length)).hexdigest()
