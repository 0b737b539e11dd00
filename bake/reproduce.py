"""A bake made again from its manifest, and what of it came out as it was."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bake.aligned import aligned
from bake.errors import ManifestError
from bake.evaluate import Rate
from bake.evidence import Evidence
from bake.hub.repositories import ADAPTER, ADDED, CARD
from bake.manifest import file_hash
from bake.pipeline import bake
from bake.prepare import prepare
from bake.progress import progress
from bake.recipe import LoadedRecipe

__all__ = ["Reproduction", "reproduce"]


@dataclass(frozen=True)
class Reproduction:
    """Files by whether their bytes came out the same, and counts of refusals that did not.

    The card is left out: a repository has one of its own, and its figures are compared here; so is
    what was only added at a push.
    """

    same: tuple[str, ...]
    other: tuple[str, ...]
    figures: int
    moved: tuple[tuple[str, str, str, str], ...]
    versions: tuple[tuple[str, str, str], ...]

    def table(self) -> str:
        """What differs, and how much was compared."""
        lines = []
        if self.versions:
            lines += [aligned([("version of", "then", "now"), *self.versions]), ""]
        if self.moved:
            lines += [aligned([("runtime", "set", "then", "now"), *self.moved]), ""]
        lines += [f"other bytes: {name}" for name in self.other]
        count = len(self.same) + len(self.other)
        lines.append(
            f"{len(self.same)} of {count} files have the same bytes, "
            f"{self.figures - len(self.moved)} of {self.figures} counts of refusals are the same"
        )
        return "\n".join(lines)


def reproduce(
    evidence: Evidence, output: Path | None = None, show: Callable[[str], None] = lambda _: None
) -> Reproduction:
    """Bake the evidence's recipe again, into `output` or a folder that is removed afterwards.

    A base of the Hub is taken at the commit that it was. Raises ManifestError, before anything
    is baked, where the base or the prompts are not what they were, and what a bake raises.
    """
    with tempfile.TemporaryDirectory(dir=".", prefix=".reproduce-") as scratch:
        loaded = _again(evidence, output or Path(scratch) / evidence.loaded.recipe.name)
        _refuse_other_inputs(evidence, loaded)
        folder = bake(loaded, show=show)
        return compare(evidence, Evidence.read(folder))


def compare(then: Evidence, now: Evidence) -> Reproduction:
    """Two bakes of one recipe; the files are those that the earlier one has."""
    before, after = then.manifest.outputs, now.manifest.outputs
    same: list[str] = []
    other: list[str] = []
    for name, digest in before.items():
        if name != CARD and not name.startswith(f"{ADDED}/"):
            # In a repository of its own the adapter is at the top.
            again = after.get(name, after.get(f"{ADAPTER}/{name}"))
            (same if again == digest else other).append(name)
    counts, again_counts = dict(_counts(then)), dict(_counts(now))
    moved = [
        (runtime, role, str(rate), str(again_counts.get((when, runtime, role), "none")))
        for (when, runtime, role), rate in counts.items()
        if again_counts.get((when, runtime, role)) != rate
    ]
    old, new = (one.manifest.versions.model_dump() for one in (then, now))
    versions = [
        (name, old.get(name, "none"), new.get(name, "none"))
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]
    return Reproduction(tuple(same), tuple(other), len(counts), tuple(moved), tuple(versions))


def _counts(evidence: Evidence) -> Iterator[tuple[tuple[str, str, str], Rate]]:
    for when, found in (("before", evidence.manifest.before), ("after", evidence.manifest.after)):
        for runtime, by_role in found.items():
            for role, rate in by_role.items():
                yield (when, f"{runtime}, {when}", role), rate


def _again(evidence: Evidence, output: Path) -> LoadedRecipe:
    """The recipe with its base at the commit of then; what it states is not changed."""
    recipe = evidence.loaded.recipe
    changed: dict[str, object] = {"output": str(output)}
    if evidence.manifest.base.commit and recipe.model != "demo" and not Path(recipe.model).is_dir():
        changed["revision"] = evidence.manifest.base.commit
    return replace(evidence.loaded, recipe=recipe.model_copy(update=changed))


def _refuse_other_inputs(evidence: Evidence, loaded: LoadedRecipe) -> None:
    """Compare the base's files and the prompts with the hashes in the manifest."""
    ready = prepare(loaded.recipe)
    inputs = evidence.manifest.inputs
    paths = [shard.file for shard in ready.base.shards] + list(ready.base.sidecars())
    paths += [part.path for part in ready.gguf.files] if ready.gguf else []
    found = {path.name: path for path in paths}
    with progress("inputs", sum(path.stat().st_size for path in paths)) as update:
        for name, digest in inputs.items():
            if name not in found:
                raise ManifestError(f"{ready.base.folder / name}: missing; the bake was made of it")
            if file_hash(found[name], update) != digest:
                raise ManifestError(
                    f"{found[name]}: is not what the bake was made of; give the base of then"
                )
    for role, parts in evidence.manifest.prompts.items():
        if ready.fingerprints.get(role) != parts:
            raise ManifestError(
                f"prompts.{role}: are not those of the bake; give the prompts of then"
            )
