"""Everything of a bake that can be known, and refused, before a weight is read."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from bake.arch import Arch
from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.directions import Directions, load_directions
from bake.errors import InputError
from bake.export.adapter import check_adapter
from bake.fit.given import GivenProbes, given_probes
from bake.gguf_file import GGUFFile
from bake.journal import hashed
from bake.manifest import file_hash, file_hashes, versions
from bake.model import LiveModel
from bake.plan import Plan, check_gguf, direction_layers, make_plan
from bake.preflight import check_room
from bake.prompts import Prompt, Splits, fingerprint, load_prompts, load_splits, united
from bake.recipe import LoadedRecipe, PromptSet, PromptSource, Recipe
from bake.saved_plan import snapshot
from bake.source import Source, find_source
from bake.staging import already_there
from bake.stream import written_sizes
from bake.work import ALONE, Work

__all__ = [
    "Prepared",
    "base_hashes",
    "base_stamps",
    "check_space",
    "check_trust",
    "in_float32",
    "loaded_model",
    "prepare",
    "run_of",
    "saved_form",
    "splits_of",
]

ROLES = ("target", "protected", "lookalike", "refused", "general")


@dataclass(frozen=True)
class Prepared:
    """A recipe with its model found, its plan made and its prompts split; nothing loaded yet."""

    recipe: Recipe
    source: Source
    base: Checkpoint
    arch: Arch
    gguf: GGUFFile | None
    plan: Plan
    splits: Mapping[str, Splits]
    texts: Splits
    directions: Directions | None = None
    directions_hash: str | None = None
    probes: Mapping[int, GivenProbes] = field(default_factory=dict)
    concepts: Mapping[str, Splits] = field(default_factory=dict)

    @property
    def given(self) -> dict[str, dict[str, str]]:
        """The files of probes by the edit that names them, each with its hash."""
        named = {
            f"edits.{number}": Path(spec.probes)
            for number, spec in enumerate(self.recipe.edits)
            if spec.op == "gate" and spec.probes is not None
        }
        return {
            edit: {"file": str(path), "sha256": file_hash(path)} for edit, path in named.items()
        }

    @property
    def fingerprints(self) -> dict[str, dict[str, str]]:
        """The fingerprints of every role's and concept's splits, and of the texts."""
        shields = {f"concept {name}": parts for name, parts in self.concepts.items()}
        return {
            role: {part: fingerprint(getattr(parts, part)) for part in ("fit", "select", "test")}
            for role, parts in {**self.splits, "text": self.texts, **shields}.items()
        }

    @property
    def concept_prompts(self) -> dict[str, tuple[Prompt, ...]]:
        """The fitting prompts of every set without a role: concepts, categories."""
        limit = self.recipe.fit.prompts_per_class
        return {name: parts.fit[:limit] for name, parts in self.concepts.items()}

    def part(self, split: str, limit: int | None = None) -> dict[str, tuple[Prompt, ...]]:
        """The prompts of one split by role."""
        return {role: getattr(parts, split)[:limit] for role, parts in self.splits.items()}


def prepare(recipe: Recipe) -> Prepared:
    """Everything that can be refused from headers and text, before a weight is read."""
    splits = {}
    for role in ROLES:
        chosen = getattr(recipe.prompts, role)
        if chosen is not None:
            splits[role] = splits_of(chosen)
    texts = splits_of(recipe.prompts.text)
    sets = dict.fromkeys((*recipe.fit.concepts, *recipe.fit.categories))
    concepts = {name: load_splits(name, language="any") for name in sets}
    directions, directions_hash = _directions(recipe)
    source = find_source(recipe)
    base = Checkpoint.open(source.folder)
    arch = find_arch(base.config, str(source.folder / "config.json"), base.tensors)
    plan = make_plan(recipe, base, arch, directions)
    gguf = GGUFFile.open(source.gguf) if source.gguf else None
    if gguf:
        check_gguf(plan, base, arch, gguf)
    if recipe.export.adapters:
        check_adapter(plan, arch)
    return Prepared(
        *(recipe, source, base, arch, gguf, plan, splits, texts),
        *(directions, directions_hash, given_probes(recipe, plan), concepts),
    )


def loaded_model(ready: Prepared, dtype: torch.dtype | None = None) -> LiveModel:
    """The recipe's model with its system prompt."""
    recipe = ready.recipe
    return LiveModel.load(
        *(ready.base.folder, ready.arch, dtype, recipe.system_prompt, recipe.trust_remote_code)
    )


def check_trust(recipe: Recipe, trusted: bool) -> None:
    """Refuse code that comes with a model, unless the recipe and whoever runs it have it so."""
    if recipe.trust_remote_code and not trusted:
        raise InputError(
            f"trust_remote_code: true lets Python code run that comes with {recipe.model}; read "
            "that, and confirm with --trust-remote-code, or leave it out"
        )
    if trusted and not recipe.trust_remote_code:
        raise InputError(
            "--trust-remote-code: the recipe does not have trust_remote_code: true; add it, or "
            "leave the option out"
        )


def splits_of(source: PromptSource) -> Splits:
    """The splits of a role's sets, or of its one set."""

    def whole(one: PromptSet) -> tuple[Prompt, ...]:
        return load_prompts(one.set, language=one.language, place=one.place)[: one.limit]

    split = [
        load_splits(one.set, language=one.language, limit=one.limit, place=one.place)
        for one in source.sets
        if one.reported
    ]
    fitted = [whole(one) for one in source.sets if one.fit_only]
    selected = [whole(one) for one in source.sets if one.select_only]
    return united(split, fitted, selected)


def _directions(recipe: Recipe) -> tuple[Directions | None, str | None]:
    """The recipe's file of directions, and its hash.

    A bare vector is of the one layer that the edits need.
    """
    if recipe.directions is None:
        return None, None
    path, layers = Path(recipe.directions), direction_layers(recipe)
    found = load_directions(path, layers[0] if len(layers) == 1 else None)
    return found, file_hash(path)


def check_space(ready: Prepared, also: Iterable[int] = ()) -> None:
    """Refuse a disk on which what is exported, and files of `also` so many bytes, have no room."""
    plan, sizes = ready.plan, [0]
    if ready.recipe.export.safetensors:
        edited = (edit.tensor for edit in plan.edits)
        sizes += written_sizes(ready.base, edited, plan.created)
    export = ready.recipe.export.gguf
    if ready.gguf and export and not export.convert:
        sizes += [part.path.stat().st_size for part in ready.gguf.files]
        if ready.gguf.is_quantised:
            names = {ready.arch.gguf_name(edit.tensor) for edit in plan.edits}
            sizes.append(in_float32(ready.gguf, names))
    folder = ready.recipe.folder
    check_room(folder, [*sizes, *also], already_there(folder))


def in_float32(gguf: GGUFFile, edited: Set[str]) -> int:
    """The bytes of a GGUF with some tensors in float32: what the baked one is compared with."""
    return sum(
        4 * prod(one.shape) if one.name in edited else one.nbytes for one in gguf.tensors.values()
    )


def base_files(ready: Prepared) -> list[Path]:
    """Every file of the base."""
    return [shard.file for shard in ready.base.shards] + list(ready.base.sidecars())


def base_hashes(ready: Prepared, work: Work = ALONE) -> dict[str, str]:
    """The SHA-256 of every file of the base; the processes of `work` share the files."""
    files = base_files(ready)
    own = {path.name: digest for path, digest in file_hashes(work.own(files)).items()}
    every = {name: digest for found in work.gathered(own) for name, digest in found.items()}
    return {path.name: every[path.name] for path in files}


def base_stamps(ready: Prepared) -> dict[Path, tuple[int, int]]:
    """When every file of the base that is there was changed last, and its size."""
    found = {path: path.stat() for path in base_files(ready) if path.exists()}
    return {path: (one.st_mtime_ns, one.st_size) for path, one in found.items()}


def run_of(ready: Prepared, hashes: Mapping[str, str]) -> str:
    """A hash of what decides a fit beside its prompts: recipe, model files, versions."""
    return hashed([ready.recipe.model_dump(mode="json"), hashes, versions()])


def saved_form(loaded: LoadedRecipe, ready: Prepared) -> dict[str, object]:
    """The plan with what it was made of, as plain values: what `bake plan --output` saves."""
    return snapshot(
        *(loaded, ready.plan, ready.base, ready.gguf, ready.fingerprints),
        *(ready.directions_hash, ready.given),
    )
