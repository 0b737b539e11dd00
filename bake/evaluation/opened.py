"""From what a person names to two subjects, the recipe behind them, and what it has seen."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from bake.archs import find_arch
from bake.cache import cache_folder
from bake.checkpoint import Checkpoint
from bake.errors import CheckpointError, InputError, ManifestError
from bake.evaluation.sets import role_splits
from bake.evaluation.subject import Live, Llama, Served, Subject
from bake.gguf_file import GGUFFile
from bake.journal import Journal, hashed
from bake.judge.cache import Replies
from bake.judge.choice import find_judge
from bake.manifest import NAME, file_hashes, read_manifest, versions
from bake.model import LiveModel
from bake.pipeline import fit_of
from bake.prepare import base_hashes, prepare, run_of
from bake.prompts import Splits
from bake.recipe import LoadedRecipe, Recipe, load_recipe, restore_recipe
from bake.runtimes.baked import base_folder, deciding, named_gguf, other_file
from bake.source import find_folder
from bake.talk.speaker import find_gguf
from bake.work import Work

__all__ = ["Named", "Opened", "named", "replies"]

# Whose prompts and judge are taken where nothing names a recipe.
DEFAULT = "political-open"


@dataclass(frozen=True)
class Named:
    """What `bake eval` was given: a baked folder, a model and a base, a server, or a recipe.

    `recipe` has the prompts and the judge; where it stands alone, its hooks are evaluated.
    """

    folder: Path | None = None
    model: str | None = None
    base: str | None = None
    server: str | None = None
    key: str | None = None
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    runtime: Literal["transformers", "llama.cpp"] | None = None

    @property
    def hooks(self) -> bool:
        """Whether a recipe stands alone."""
        return bool(self.recipe and not (self.folder or self.base or self.server))


@dataclass(frozen=True)
class Opened:
    """Two subjects, `base` None where there is none; the recipe, and the splits of its prompts.

    `manifest` is that of the bake which is evaluated. The folders are those of checkpoints, for
    the harness.
    """

    base: Subject | None
    model: Subject
    loaded: LoadedRecipe
    splits: Mapping[str, Splits]
    manifest: Mapping[str, Any] | None
    place: str
    base_folder: Path | None = None
    folder: Path | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe whose prompts and judge are taken."""
        return self.loaded.recipe


def replies(fresh: bool = False) -> Replies:
    """Where answers are kept, and read unless `fresh`."""
    return Replies(cache_folder() / "answers", not fresh)


@contextmanager
def named(given: Named, fresh: bool = False) -> Iterator[Opened]:
    """Find everything that was named, and refuse from headers and text what does not fit.

    A server is asked again for what is cached where `fresh`. Raises an InputError that names the
    option. Models are loaded here, GGUFs when they are asked.
    """
    with ExitStack() as stack:
        if given.hooks:
            yield _hooked(given)
            return
        place = given.folder or (Path(given.model) if given.model and not given.server else None)
        manifest = _manifest(place) if place else None
        loaded = _recipe(given, manifest, place)
        splits = role_splits(loaded.recipe)
        parts = _subjects(given, manifest, loaded.recipe, replies(fresh), stack)
        stands = str(place / NAME) if place else ""
        yield Opened(loaded=loaded, splits=splits, manifest=manifest, place=stands, **parts)


def _subjects(
    given: Named,
    manifest: Mapping[str, Any] | None,
    recipe: Recipe,
    kept: Replies,
    stack: ExitStack,
) -> dict[str, Any]:
    """The fields of `Opened` that are not of the recipe."""
    name = str(given.folder) if given.folder else given.model
    assert name is not None
    if given.server:
        served = [
            Served.at(given.server, one, given.key, kept) if one else None
            for one in (given.base, name)
        ]
        return {"base": served[0], "model": served[1]}
    if _in_llama(given, name, manifest):
        return _ggufs(given, name, manifest, recipe, stack)
    return _checkpoints(given, name, manifest, recipe)


def _manifest(place: Path) -> dict[str, Any] | None:
    """The manifest of a folder, if a bake wrote it."""
    if not (place.is_dir() and (place / NAME).exists()):
        return None
    found = read_manifest(place)
    if found.get("broken"):
        raise ManifestError(f"{place}: is the evidence of a bake that broke its guard; no weights")
    return found


def _recipe(given: Named, manifest: Mapping[str, Any] | None, place: Path | None) -> LoadedRecipe:
    """The recipe that was named, else that of the bake, else the default one."""
    if given.folder and manifest is None:
        raise ManifestError(
            f"{given.folder / NAME}: no such file; give the folder of a bake, or --model and --base"
        )
    if given.recipe and manifest is not None:
        raise InputError(
            f"--recipe: {place} has its own in {NAME}, which says what its fit has seen; leave it "
            "out, and name other sets with --sets"
        )
    if manifest is None:
        return load_recipe(given.recipe or DEFAULT, overrides=given.overrides)
    more = [f"--set {one}" for one in given.overrides]
    match manifest.get("recipe"):
        case {"text": str(text), "source": str(source), "overrides": list(overrides)}:
            where = f"{place}/{NAME}"
            return restore_recipe(text, source, [*overrides, *more], where)
    raise ManifestError(f"{place}/{NAME}: recipe: expected its text, source and overrides")


def _hooked(given: Named) -> Opened:
    """The recipe's base, and the same with the recipe's interventions on it."""
    assert given.recipe is not None
    loaded = load_recipe(given.recipe, overrides=given.overrides, model=given.model)
    recipe = loaded.recipe
    torch.manual_seed(recipe.seed)
    ready = prepare(recipe)
    hashes = base_hashes(ready)
    run = run_of(ready, hashes)
    model = LiveModel.load(ready.base.folder, ready.arch, system=recipe.system_prompt)
    working = replace(model, work=Work(journal=Journal.of(run)))
    fitted = fit_of(ready, working, find_judge(recipe.judge))
    base = Live(recipe.model, model, _identity(ready.base), (), recipe.evaluate.batch)
    identity = {"hooks": run, **_versions()}
    hooked = Live(recipe.name, model, identity, fitted.interventions, recipe.evaluate.batch)
    splits = {**ready.splits, "text": ready.texts}
    return Opened(base, replace(hooked, runtime="hooks"), loaded, splits, None, loaded.source)


def _in_llama(given: Named, name: str, manifest: Mapping[str, Any] | None) -> bool:
    if given.runtime:
        return given.runtime == "llama.cpp"
    weights = manifest is None or any(one.endswith("safetensors") for one in _top(manifest))
    return name.endswith(".gguf") or not weights


def _top(manifest: Mapping[str, Any]) -> list[str]:
    """The files of a bake that do not lie in a folder inside."""
    return [one for one in manifest["outputs"] if "/" not in one]


def _ggufs(
    given: Named,
    name: str,
    manifest: Mapping[str, Any] | None,
    recipe: Recipe,
    stack: ExitStack,
) -> dict[str, Any]:
    model = _llama(find_gguf(name), name)
    stack.callback(model.close)
    base: Path | None = None
    if given.base:
        base = find_gguf(given.base)
    elif manifest is not None:
        base = named_gguf(recipe)
        if base is None or not base.is_file():
            raise InputError(
                f"{name}: its GGUF is the checkpoint's, converted, or its base lies elsewhere; "
                "give a GGUF of the base with --base"
            )
        if other := other_file(
            [part.path for part in GGUFFile.open(base).files], _inputs(manifest)
        ):
            raise InputError(f"{other}: is not the file that was baked; give that one with --base")
    if base is None:
        return {"model": model}
    found = _llama(base, given.base or base.name)
    stack.callback(found.close)
    return {"model": model, "base": found}


def _llama(path: Path, name: str) -> Llama:
    parts = [part.path for part in GGUFFile.open(path).files]
    hashes = {one.name: digest for one, digest in file_hashes(parts).items()}
    return Llama(name, path, {"gguf": sorted(hashes.values()), **_versions()})


def _checkpoints(
    given: Named, name: str, manifest: Mapping[str, Any] | None, recipe: Recipe
) -> dict[str, Any]:
    for one in (name, given.base or ""):
        if one.endswith(".gguf"):
            raise InputError(f"{one}: transformers reads folders; take --runtime llama.cpp")
    folder = find_folder(name)
    base: Path | None = None
    if given.base:
        base = find_folder(given.base)
    elif manifest is not None:
        base = base_folder(recipe)
    deciders = deciding(Checkpoint.open(base)) if base is not None and manifest is not None else []
    if other := other_file(deciders, _inputs(manifest)):
        raise CheckpointError(
            f"{other}: is not the file that was baked ({name}/{NAME}, inputs); give that revision "
            "of the base with --base"
        )
    found: dict[str, Any] = {"model": _live(folder, name, recipe), "folder": folder}
    if base is not None:
        title = given.base or recipe.model
        found |= {"base": _live(base, title, recipe), "base_folder": base}
    return found


def _live(folder: Path, name: str, recipe: Recipe) -> Live:
    checkpoint = Checkpoint.open(folder)
    arch = find_arch(checkpoint.config, str(folder / "config.json"), checkpoint.tensors)
    model = LiveModel.load(folder, arch, system=recipe.system_prompt)
    return Live(name, model, _identity(checkpoint), (), recipe.evaluate.batch)


def _identity(checkpoint: Checkpoint) -> dict[str, object]:
    """What decides a checkpoint's answers: its files by hash, and versions."""
    hashes = {path.name: digest for path, digest in file_hashes(deciding(checkpoint)).items()}
    return {"files": hashes, **_versions()}


def _inputs(manifest: Mapping[str, Any] | None) -> Mapping[str, str]:
    found = (manifest or {}).get("inputs")
    return found if isinstance(found, dict) else {}


def _versions() -> dict[str, str]:
    """The versions that decide an answer."""
    return {"versions": hashed(versions())}
