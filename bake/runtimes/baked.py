"""A baked folder with its base: the hooked model again, from the folder's own evidence.

Nothing is fitted again. `bake.json` has the recipe and the hashes of the base, `steering/` what
was fitted, `answers.jsonl` the held-out prompts; the base's weights alone come from elsewhere.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake.arch import Arch
from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.directions import load_directions
from bake.edits import Edit
from bake.errors import CheckpointError, GGUFError, InputError, ManifestError
from bake.export.conversion import TEXT, Road
from bake.fit.kept import built_again, read_kept
from bake.gguf_file import GGUFFile
from bake.hooks import Intervention, edits_by_tensor
from bake.imatrix import Importance, read_importance
from bake.manifest import NAME, file_hash, read_manifest
from bake.plan import Plan, make_plan
from bake.progress import progress
from bake.prompts import Prompt
from bake.recipe import Recipe, restore_recipe
from bake.record import DIRECTIONS, KEPT
from bake.source import find_source

__all__ = ["Baked", "base_folder", "deciding", "named_gguf", "other_file"]

# What decides a base's logits and tokens; its README may change on the Hub.
DECIDING = re.compile(
    r"config\.json|.*\.safetensors|tokenizer.*|.*\.model|vocab.*|merges.*|chat_template.*"
)


@dataclass(frozen=True)
class Baked:
    """A baked folder, its base and its interventions; no weight is in memory."""

    folder: Path
    recipe: Recipe
    base: Checkpoint
    arch: Arch
    plan: Plan
    interventions: tuple[Intervention, ...]
    prompts: Mapping[str, tuple[Prompt, ...]]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    @classmethod
    def open(cls, folder: Path, base: Path | None = None) -> "Baked":
        """Read a folder and find its base, at `base` or where the recipe has it.

        Raises ManifestError for a folder whose evidence is not whole, CheckpointError where the
        base is not there or another one.
        """
        manifest = read_manifest(folder)
        recipe, inputs = _recipe(folder, manifest), manifest.get("inputs")
        if not isinstance(inputs, dict):
            raise ManifestError(f"{folder / NAME}: inputs: expected the hashes of the base's files")
        place = base or base_folder(recipe)
        found = Checkpoint.open(place)
        if other := other_file(deciding(found), inputs):
            raise CheckpointError(
                f"{other}: is not the file that was baked ({folder / NAME}, inputs); give that "
                "revision of the base with --base"
            )
        arch = find_arch(found.config, str(place / "config.json"), found.tensors)
        directions = load_directions(folder / DIRECTIONS)
        plan = make_plan(recipe, found, arch)
        _check_plan(folder, plan, manifest)
        kept = read_kept(folder / KEPT)
        built = built_again(recipe, plan, found, arch, directions, kept)
        return cls(
            *(folder, recipe, found, arch, plan, built, _prompts(folder)),
            *(inputs, manifest["outputs"]),
        )

    @property
    def edited(self) -> tuple[str, ...]:
        """The edited tensors, by the names that are written."""
        return tuple(dict.fromkeys(self.plan.name(edit.tensor) for edit in self.plan.edits))

    @property
    def edits(self) -> dict[str, list[Edit]]:
        """The edits by tensor, as the base names them."""
        return edits_by_tensor(self.interventions)

    @property
    def gguf(self) -> Path:
        """The baked GGUF, by its first part; raises InputError where there is none."""
        pattern = re.compile(rf"{re.escape(self.recipe.name)}(-00001-of-\d{{5}})?\.gguf")
        for name in self.outputs:
            if pattern.fullmatch(name):
                return self.folder / name
        raise InputError(f"{self.folder}: has no GGUF; take --runtime transformers or mlx")

    @property
    def checkpoint(self) -> Path:
        """The folder, if it has a checkpoint; raises InputError where there is none."""
        if not self.recipe.export.safetensors:
            raise InputError(f"{self.folder}: has no safetensors; take --runtime llama.cpp")
        return self.folder

    def importance(self, road: Road, full: GGUFFile) -> Importance | None:
        """The importance matrix that the baked checkpoint was quantised by, for its base.

        `full` is the base in floating point. A matrix that was computed lies in the folder.
        Raises GGUFError where it is not there or another one.
        """
        given = road.asked.imatrix
        if given is None:
            return None
        if given != TEXT:
            path = Path(given)
            if not path.is_file() or other_file([path], self.inputs):
                raise GGUFError(
                    f"{path}: is not the importance matrix that was baked with, or not there "
                    f"({self.folder / NAME}, inputs); put that one there"
                )
            return read_importance(path)
        renamed = self.plan.insertion.of_gguf().renamed(full.tensors)
        found = read_importance(self.folder / road.importance_name)
        return found.renamed({new: old for old, new in renamed.items()})

    def base_gguf(self, given: Path | None) -> Path | None:
        """The base GGUF of the recipe, at `given` or where it has it; None if it has none.

        Raises GGUFError where it is not there or another one, InputError for one that the recipe
        does not know.
        """
        named = named_gguf(self.recipe)
        if given and not named:
            raise InputError(
                f"--base-gguf {given}: {self.folder} was made without a GGUF of the base; leave "
                "it out: the base is converted as the baked checkpoint was"
            )
        path = given or named
        if path is None:
            return None
        if not path.is_file():
            raise GGUFError(f"{path}: no such file; give the GGUF that was baked with --base-gguf")
        parts = [part.path for part in GGUFFile.open(path).files]
        if named and (other := other_file(parts, self.inputs)):
            raise GGUFError(
                f"{other}: is not the file that was baked ({self.folder / NAME}, inputs); give "
                "that one with --base-gguf"
            )
        return path


def deciding(checkpoint: Checkpoint) -> list[Path]:
    """The files of a checkpoint that decide its logits and tokens."""
    files = [shard.file for shard in checkpoint.shards] + list(checkpoint.sidecars())
    return [path for path in files if DECIDING.fullmatch(path.name)]


def other_file(files: Sequence[Path], inputs: Mapping[str, str], shown: bool = True) -> Path | None:
    """The first of some files that does not have the hash of a bake's input; all are read once."""
    total = sum(path.stat().st_size for path in files)
    with progress("base", total, shown and bool(files)) as update:
        for path in files:
            if inputs.get(path.name) != file_hash(path, update):
                return path
    return None


def _recipe(folder: Path, manifest: Mapping[str, Any]) -> Recipe:
    match manifest.get("recipe"):
        case {"text": str(text), "source": str(source), "overrides": list(overrides)}:
            return restore_recipe(text, source, overrides, str(folder / NAME)).recipe
    raise ManifestError(f"{folder / NAME}: recipe: expected its text, source and overrides")


def base_folder(recipe: Recipe) -> Path:
    """Where the recipe has its base checkpoint."""
    exported = recipe.export.model_copy(update={"gguf": None})
    try:
        return find_source(recipe.model_copy(update={"export": exported})).folder
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or name the base's folder with --base") from error


def named_gguf(recipe: Recipe) -> Path | None:
    """The base GGUF of a recipe, where it has one."""
    base = recipe.export.gguf.base if recipe.export.gguf else None
    if base == "demo":
        from bake.demo import materialise

        return materialise().gguf
    return Path(base) if base else None


def _check_plan(folder: Path, plan: Plan, manifest: Mapping[str, Any]) -> None:
    """Refuse a folder of a bake whose plan is not what this version of bake makes of its recipe."""
    now, then = json.loads(json.dumps(plan.as_json())), manifest.get("plan")
    for key in ("edits", "created", "inserted", "renamed"):
        if not isinstance(then, dict) or then.get(key) != now[key]:
            raise ManifestError(
                f"{folder / NAME}: plan.{key}: this version of bake plans otherwise, so the hooked "
                "model would be another one; use the version that baked it (versions.bake)"
            )


def _prompts(folder: Path) -> dict[str, tuple[Prompt, ...]]:
    """The held-out prompts by set, each once, in the order in which they were answered."""
    path = folder / "answers.jsonl"
    found: dict[str, dict[Prompt, None]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            match json.loads(line):
                case {"set": str(role), "prompt": str(text), "topic": str(topic)}:
                    found.setdefault(role, {})[Prompt(text, topic, "any")] = None
                case _:
                    raise ValueError("a line without set, prompt and topic")
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: cannot be read: {error}; download it again") from error
    if not found:
        raise ManifestError(f"{path}: has no prompt; download it again")
    return {role: tuple(prompts) for role, prompts in found.items()}
