"""The road from a baked checkpoint to a GGUF of any type: convert, weigh, quantise.

The unedited checkpoint goes the same road first, before anything is fitted: whatever the
converter or the quantiser refuses is refused then, and its file is what the baked one is compared
with. The importance matrix is made of it, and serves for both.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import MappingProxyType

import torch
from gguf import GGMLQuantizationType

from bake.arch import Arch
from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.edits import Edit, apply_all
from bake.errors import VerificationError
from bake.export.convert import convert
from bake.export.converter import find_converter
from bake.export.gguf import PatchedTensor, patch
from bake.export.importance import collect_importance
from bake.export.layout import gguf_pairs
from bake.export.quantise import Quantisation, quantise
from bake.export.requantise import Change
from bake.export.same_logits import check_same_logits, logits_apart
from bake.gguf_file import GGUFFile
from bake.imatrix import Importance, read_importance, write_importance
from bake.model import LiveModel
from bake.plan import Plan
from bake.progress import progress
from bake.prompts import load_splits
from bake.recipe import Conversion, Recipe
from bake.staging import check_file, staged_file

__all__ = ["TEXT", "Reference", "Road", "convert_to_file", "survivals"]

TEXT = "text"
"""What stands for an importance matrix that is computed."""
_F16 = GGMLQuantizationType.F16
_FILE_TYPE = "general.file_type"
_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def _lossless(base: Checkpoint) -> str:
    """The converter's type that holds every matrix of a checkpoint as it is."""
    kinds = {one.dtype for one in base.tensors.values() if len(one.shape) > 1}
    return {frozenset({"BF16"}): "bf16", frozenset({"F16"}): "f16"}.get(frozenset(kinds), "f32")


@dataclass(frozen=True)
class Reference:
    """The unedited model: in floating point, as asked, its matrix, and how close it is.

    `apart` is what `check_same_logits` measured of `full`.
    """

    full: GGUFFile
    file: GGUFFile
    importance: Importance | None
    apart: float


@dataclass(frozen=True)
class Road:
    """How checkpoints become GGUFs: the same way, whichever of them.

    `tree` is llama.cpp's, `outtype` the converter's type in between, `name` what the model is
    called in the metadata, and `mix` the file whose types `type: base` takes. The
    matrices `edited`, by their names in the unedited file, are in `edited_type` if that is one.
    """

    tree: Path
    asked: Conversion
    outtype: str
    name: str
    mix: GGUFFile | None = None
    edited: tuple[str, ...] = ()
    edited_type: GGMLQuantizationType | None = None

    @classmethod
    def of(
        cls,
        tree: Path,
        asked: Conversion,
        base: Checkpoint,
        name: str,
        mix: GGUFFile | None = None,
        edited: Iterable[str] = (),
        edited_type: str | None = None,
    ) -> "Road":
        """The road for a checkpoint, whose own type is the one in between."""
        outtype = asked.type if asked.is_float else _lossless(base)
        if mix is not None and not mix.is_quantised:
            outtype = Counter(_types(mix).values()).most_common(1)[0][0].name.lower()
            asked = Conversion(type=outtype)
        kind = _kind_or_none(edited_type)
        return cls(tree, asked, outtype, name, mix, tuple(edited), kind)

    @classmethod
    def planned(
        cls,
        recipe: Recipe,
        plan: Plan,
        arch: Arch,
        base: Checkpoint,
        mix: GGUFFile | None,
        llama_cpp: Path | None,
    ) -> "Road | None":
        """The road of a recipe, if it converts; `llama_cpp` is the tree (`find_converter`)."""
        export = recipe.export.gguf
        if export is None or export.convert is None:
            return None
        matrices = (edit.tensor for edit in plan.edits if len(edit.shape) > 1)
        edited = sorted({arch.gguf_name(name) for name in matrices if name in base.tensors})
        tree, kind = find_converter(llama_cpp), export.named_type
        kind = None if export.patches_converted else kind
        return cls.of(tree, export.convert, base, recipe.name, mix, edited, kind)

    @property
    def importance_name(self) -> str:
        """What the importance matrix is called in the metadata."""
        given = self.asked.imatrix
        return f"{self.name}.imatrix.gguf" if given in (None, TEXT) else Path(str(given)).name

    def reference(
        self, folder: Path, model: LiveModel, texts: Sequence[str], aside: Path
    ) -> Reference:
        """Convert the unedited checkpoint into the folder `aside`, and compare it with `model`.

        That one is the checkpoint's in float32: in bfloat16 rounding would be most of what is seen.

        Raises as `convert`, `check_same_logits`, `read_importance` and `quantise` do.
        """
        full = self.converted(folder, aside / "base.gguf")
        apart = check_same_logits(full.path, model, texts)
        importance = self.importance(full, texts)
        file = full
        if not self.asked.is_float:
            file = self.quantised(full, aside / "base.quantised.gguf", importance)
        return Reference(full, file, importance, apart)

    def baked(
        self,
        folder: Path,
        output: Path,
        reference: Reference,
        plan: Plan,
        arch: Arch,
        patched: GGUFFile,
        aside: Path,
    ) -> GGUFFile:
        """Convert the baked checkpoint to the new file `output`, as the reference was.

        Where blocks are inserted, every other keeps the types that it has in the reference, and
        they are in F16, which their numbers are made for. `patched` is the reference in floating
        point with the plan's edits: VerificationError where the converter made anything else.
        """
        full = self.converted(folder, aside / "baked.gguf")
        full = _with_pairs(full, gguf_pairs(plan, arch, reference.full), aside / "lists.gguf")
        _check_same(full, patched)
        if self.asked.is_float:
            shutil.move(full.path, output)
            return GGUFFile.open(output)
        insertion = plan.insertion.of_gguf()
        if not insertion.after:
            return self.quantised(full, output, reference.importance)
        renamed = insertion.renamed(reference.full.tensors)
        asked = _as_in(reference.file, reference.full.tensors, renamed)
        numbers = (insertion.number(insertion.behind(layer)) for layer in insertion.after)
        inserted = ((rf"^blk\.{number}\.", _F16) for number in numbers)
        asked = replace(asked, tensor_types=(*asked.tensor_types, *inserted))
        importance = reference.importance and reference.importance.renamed(renamed)
        return self.quantised(full, output, importance, asked)

    def size(self, base: Checkpoint) -> int:
        """The bytes of a checkpoint in floating point, nearly; from headers alone."""
        width = _DTYPES[GGMLQuantizationType[self.outtype.upper()]].itemsize
        return width * sum(prod(one.shape) for one in base.tensors.values())

    def converted(self, folder: Path, output: Path) -> GGUFFile:
        """A checkpoint in floating point."""
        with progress(f"converting to {self.outtype}", 1) as update:
            convert(self.tree, folder, output, self.outtype, self.name)
            update(1)
        return GGUFFile.open(output)

    def importance(self, full: GGUFFile, texts: Sequence[str]) -> Importance | None:
        """The importance matrix that was asked for."""
        if self.asked.imatrix is None:
            return None
        if self.asked.imatrix != TEXT:
            return read_importance(Path(self.asked.imatrix))
        with progress("importance matrix", len("\n\n".join(texts)) // 4) as update:
            return collect_importance(
                full.path, texts, TEXT, torch.get_num_threads(), progress=update
            )

    def quantised(
        self,
        full: GGUFFile,
        output: Path,
        importance: Importance | None,
        asked: Quantisation | None = None,
    ) -> GGUFFile:
        """A file in floating point as asked."""
        with progress(f"quantising to {self.asked.type}", len(full.tensors)) as update:
            quantise(
                *(full, output, asked or self._quantisation(full), torch.get_num_threads()),
                importance=importance,
                name=self.importance_name,
                progress=update,
            )
        return GGUFFile.open(output)

    def save_importance(self, importance: Importance, folder: Path) -> None:
        """Write an importance matrix that was computed."""
        write_importance(importance, folder / self.importance_name)

    def _quantisation(self, full: GGUFFile) -> Quantisation:
        if self.mix is not None:
            found = _as_in(self.mix, full.tensors)
        else:
            found = Quantisation(
                self.asked.type,
                tuple((one, _kind(name)) for one, name in self.asked.tensor_types.items()),
                _kind_or_none(self.asked.output_tensor_type),
                _kind_or_none(self.asked.token_embedding_type),
                self.asked.pure,
            )
        if self.edited_type is None:
            return found
        edited = tuple((_whole(name), self.edited_type) for name in self.edited)
        return replace(found, tensor_types=(*edited, *found.tensor_types))


def convert_to_file(
    folder: Path,
    output: Path,
    asked: Conversion,
    *,
    llama_cpp: Path | None = None,
    mix: Path | None = None,
    overwrite: bool = False,
) -> str:
    """Convert a checkpoint, edited or not, to the file `output`; returns what was measured.

    `llama_cpp` is the tree (`find_converter`), `mix` the file whose types `type: base` takes. A
    computed importance matrix, of the built-in texts, is written beside the output. Raises a
    BakeError as `Road.reference` does; nothing is left behind then.
    """
    check_file(output, overwrite)
    name = folder.resolve().name
    beside = output.with_name(f"{output.name.removesuffix('.gguf')}.imatrix.gguf")
    if asked.imatrix == TEXT:
        check_file(beside, overwrite)
    base = Checkpoint.open(folder)
    arch = find_arch(base.config, str(folder / "config.json"), base.tensors)
    taken = GGUFFile.open(mix) if mix else None
    road = Road.of(find_converter(llama_cpp), asked, base, name, mix=taken)
    texts = [one.text for one in load_splits(TEXT, language="any").fit]
    with (
        staged_file(output, overwrite) as staging,
        tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as aside,
    ):
        model = LiveModel.load(folder, arch, torch.float32)
        made = road.reference(folder, model, texts, Path(aside))
        apart = f"{made.apart:.2%} in {road.outtype}"
        if made.file is not made.full:
            quantised = logits_apart(made.file.path, model, texts)
            apart += f", {quantised:.2%} in {road.asked.type}"
        made.file.path.replace(staging)
        if asked.imatrix == TEXT and made.importance:
            with staged_file(beside, overwrite) as importance:
                write_importance(made.importance, importance)
    return f"logits apart from the checkpoint's: {apart}"


def survivals(
    reference: Reference,
    written: GGUFFile,
    edits: Mapping[str, Sequence[Edit]],
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> tuple[PatchedTensor, ...]:
    """How every edited matrix of the base was written, as `patch` reports it.

    `edits` are by GGUF name, `renamed` has the names written. Share and noise are of what the
    written matrix differs from the unedited one in floating point by, so the noise is that of
    the whole matrix's rounding.
    """
    found = []
    for name in [name for name in reference.full.tensors if name in edits]:
        before = reference.full.read(name)
        tensor = written.tensors[renamed.get(name, name)]
        after = apply_all(edits[name], before)
        flat, wanted = (one.reshape(-1, tensor.shape[-1]) for one in (before, after))
        path = written.path_of(tensor)
        survival = Change(path, tensor, flat, wanted, None).survival(path, tensor)
        error = written.read(tensor.name).sub_(after)
        residual = max(one.residual(before, one.apply(before) + error) for one in edits[name])
        kinds = reference.full.tensors[name].type, tensor.type
        found.append(PatchedTensor(tensor.name, *kinds, survival.share, survival.noise, residual))
    return tuple(found)


def _check_same(converted: GGUFFile, patched: GGUFFile) -> None:
    """Two roads to one model: what the converter makes of a baked checkpoint, and a patched file.

    A checkpoint has zeros where only one layer of many has a bias, and the patched file nothing.
    """
    for name in patched.tensors.keys() - converted.tensors.keys():
        raise VerificationError(f"convert: llama.cpp's converter left out {name}")
    for name, tensor in converted.tensors.items():
        found = converted.read(name)
        wanted = patched.read(name) if name in patched.tensors else torch.zeros_like(found)
        if found.shape != wanted.shape:
            raise VerificationError(
                f"convert: {name} has shape {list(found.shape)}, {list(wanted.shape)} was planned"
            )
        rounding = 2 * torch.finfo(_DTYPES[tensor.type]).eps + 1e-5
        if not float((found - wanted).norm()) <= rounding * float(wanted.norm()):
            raise VerificationError(
                f"convert: {name} is not what was planned: llama.cpp's converter "
                "made something else of the baked checkpoint; patch a GGUF with export.gguf.base"
            )


def _with_pairs(file: GGUFFile, pairs: Mapping[str, bytes], output: Path) -> GGUFFile:
    """The file with some metadata, written anew where it has another.

    The converter writes lists of what each block is for a few architectures alone, and llama.cpp
    takes the others' from a block's number, which an inserted block moves.
    """
    if all(_pair(file, key) == pair for key, pair in pairs.items()):
        return file
    patch(file, {}, output, edited_type=_F16, pairs=pairs)
    file.path.unlink()
    return GGUFFile.open(output)


def _pair(file: GGUFFile, key: str) -> bytes | None:
    span = file.pairs.get(key)
    if span is None:
        return None
    with file.path.open("rb") as stream:
        stream.seek(span.start)
        return stream.read(span.nbytes)


def _types(file: GGUFFile) -> dict[str, GGMLQuantizationType]:
    return {name: one.type for name, one in file.tensors.items() if len(one.shape) > 1}


def _as_in(
    file: GGUFFile, names: Iterable[str], renamed: Mapping[str, str] = MappingProxyType({})
) -> Quantisation:
    """Every matrix in the type that it has in a file; patterns are whole names."""
    types = _types(file)
    patterns = ((_whole(renamed.get(name, name)), types[name]) for name in names if name in types)
    kind = file.metadata.get(_FILE_TYPE)
    # Every matrix is named, so the type itself decides nothing but what the metadata says.
    return Quantisation("q8_0", tuple(patterns), file_type=kind if isinstance(kind, int) else None)


def _whole(name: str) -> str:
    """The pattern of this name alone."""
    return "^" + name.replace(".", r"\.") + "$"


def _kind(name: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[name.upper()]


def _kind_or_none(name: str | None) -> GGMLQuantizationType | None:
    return None if name is None else _kind(name)
