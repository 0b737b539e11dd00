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
from bake.prepare import base_hashes, check_trust, prepare, run_of
from bake.prompts import Splits
from bake.recipe import LoadedRecipe, Recipe, load_recipe, restore_recipe
from bake.runtimes.baked import base_folder, deciding, named_gguf, other_file
from bake.source import find_folder
from bake.talk.speaker import find_gguf
from bake.work import ALONE, Work

__all__ = ["Named", "Opened", "Source", "opened", "replies", "source_of"]

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
        """Whether a recipe stands alone; a GGUF beside it takes no hooks."""
        other = self.folder or self.base or self.server
        return bool(self.recipe and not other and not (self.model or "").endswith(".gguf"))


@dataclass(frozen=True)
class Source:
    """The recipe whose prompts and judge are taken, and what its fit has seen.

    `manifest` is that of the bake which is evaluated, if one is, and stands at `place`.
    """

    loaded: LoadedRecipe
    splits: Mapping[str, Splits]
    manifest: Mapping[str, Any] | None = None
    place: Path | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe itself."""
        return self.loaded.recipe


@dataclass(frozen=True)
class Opened:
    """Two subjects, `base` None where there is none; checkpoints' folders, for the harness."""

    base: Subject | None
    model: Subject
    base_folder: Path | None = None
    folder: Path | None = None


def replies(fresh: bool = False) -> Replies:
    """Where answers are kept, and read unless `fresh`."""
    return Replies(cache_folder() / "answers", not fresh)


def source_of(given: Named) -> Source:
    """The recipe that was named, or that of the bake, with its prompts; no model is looked at.

    Raises ManifestError, RecipeError or PromptError.
    """
    if given.hooks:
        assert given.recipe is not None
        loaded = load_recipe(given.recipe, overrides=given.overrides, model=given.model)
        return Source(loaded, role_splits(loaded.recipe))
    place = given.folder or (Path(given.model) if given.model and not given.server else None)
    manifest = _manifest(place) if place else None
    loaded = _recipe(given, manifest, place)
    stands = place / NAME if manifest is not None and place else None
    return Source(loaded, role_splits(loaded.recipe), manifest, stands)


@contextmanager
def opened(
    given: Named, source: Source, fresh: bool = False, work: Work = ALONE
) -> Iterator[Opened]:
    """The subjects; a server is asked again for what is cached where `fresh`.

    Checkpoints are loaded here, GGUFs when they are asked; the processes of `work` share the fit
    of a recipe's hooks. Raises an InputError for a model that is not there, or whose base is not
    the one that was baked.
    """
    name = str(given.folder) if given.folder else given.model
    with ExitStack() as stack:
        if given.hooks:
            yield _hooked(source, work)
        elif given.server:
            assert name is not None
            kept = replies(fresh)
            base, model = (
                Served.at(given.server, one, given.key, kept) if one else None
                for one in (given.base, name)
            )
            assert model is not None
            yield Opened(base, model)
        else:
            assert name is not None
            in_llama = _in_llama(given, name, source.manifest)
            yield (
                _ggufs(given, name, source, stack, work)
                if in_llama
                else _checkpoints(given, name, source, work)
            )


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


def _hooked(source: Source, work: Work) -> Opened:
    """The recipe's base, and the same with the recipe's interventions on it."""
    recipe = source.recipe
    check_trust(recipe, False)
    torch.manual_seed(recipe.seed)
    with work.main_first():
        ready = prepare(recipe)
    run = run_of(ready, base_hashes(ready, work))
    model = LiveModel.load(ready.base.folder, ready.arch, system=recipe.system_prompt)
    working = replace(model, work=replace(work, journal=Journal.of(run)))
    fitted = fit_of(ready, working, find_judge(recipe.judge))
    base = Live(recipe.model, model, _identity(ready.base), (), recipe.evaluate.batch)
    seen = hashed([run, ready.fingerprints, ready.directions_hash, ready.given])
    identity: dict[str, object] = {"hooks": seen, **_versions()}
    hooked = Live(recipe.name, model, identity, fitted.interventions, recipe.evaluate.batch)
    return Opened(base, replace(hooked, runtime="hooks"))


def _in_llama(given: Named, name: str, manifest: Mapping[str, Any] | None) -> bool:
    if given.runtime:
        return given.runtime == "llama.cpp"
    weights = manifest is None or any(one.endswith("safetensors") for one in _top(manifest))
    return name.endswith(".gguf") or not weights


def _top(manifest: Mapping[str, Any]) -> list[str]:
    """The files of a bake that do not lie in a folder inside."""
    return [one for one in manifest["outputs"] if "/" not in one]


def _ggufs(given: Named, name: str, source: Source, stack: ExitStack, work: Work) -> Opened:
    with work.main_first():
        found = find_gguf(name)
        base: Path | None = None
        if given.base:
            base = find_gguf(given.base)
        elif source.manifest is not None:
            base = named_gguf(source.recipe)
    model = _llama(found, name)
    stack.callback(model.close)
    if source.manifest is not None and not given.base:
        if base is None or not base.is_file():
            raise InputError(
                f"{name}: its GGUF is the checkpoint's, converted, or its base lies elsewhere; "
                "give a GGUF of the base with --base"
            )
        parts = [part.path for part in GGUFFile.open(base).files]
        if other := other_file(parts, _inputs(source.manifest), work.main):
            raise InputError(f"{other}: is not the file that was baked; give that one with --base")
    if base is None:
        return Opened(None, model)
    plain = _llama(base, given.base or base.name)
    stack.callback(plain.close)
    return Opened(plain, model)


def _llama(path: Path, name: str) -> Llama:
    parts = [part.path for part in GGUFFile.open(path).files]
    hashes = {one.name: digest for one, digest in file_hashes(parts).items()}
    return Llama(name, path, {"gguf": sorted(hashes.values()), **_versions()})


def _checkpoints(given: Named, name: str, source: Source, work: Work) -> Opened:
    for one in (name, given.base or ""):
        if one.endswith(".gguf"):
            raise InputError(f"{one}: transformers reads folders; take --runtime llama.cpp")
    recipe, base = source.recipe, None
    with work.main_first():
        folder = find_folder(name)
        if given.base:
            base = find_folder(given.base)
        elif source.manifest is not None:
            base = base_folder(recipe)
    if base is None:
        return Opened(None, _live(folder, name, recipe), None, folder)
    deciders = deciding(Checkpoint.open(base)) if source.manifest is not None else []
    if other := other_file(deciders, _inputs(source.manifest), work.main):
        raise CheckpointError(
            f"{other}: is not the file that was baked ({source.place}, inputs); give that revision "
            "of the base with --base"
        )
    found = _live(base, given.base or recipe.model, recipe)
    return Opened(found, _live(folder, name, recipe), base, folder)


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
