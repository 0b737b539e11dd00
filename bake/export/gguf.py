"""Patch a GGUF file: edits on some tensors, new biases and blocks, the rest byte for byte.

A quantised weight lies on its lattice, so an edit below half a step rounds back when
it is written in the base's own 4-bit type; what an edited matrix is written in is chosen by what
survives of the edit (`bake.export.requantise`), measured from the bytes of the output.

A split model is written in as many parts, each tensor in the part that it was in. The output is
written with its header last: until then it is no GGUF at all. The order
and alignment of the data follow gguf-py's `gguf_writer.py` (`write_tensors_to_file`).
"""

import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from bake.edits import CreatedTensor, Edit, apply_all
from bake.errors import GGUFError, OutputError, VerificationError
from bake.export.gguf_bytes import Files, copy, open_base, packed_string, pairs_of_part, span_of
from bake.export.lattice import find_lattice
from bake.export.requantise import (
    FLOATS,
    MOST_NOISE_SAME,
    Change,
    EditedType,
    Survival,
    Way,
    ways,
)
from bake.ggml import LARGEST, WRITABLE, needs_importance, row_bytes
from bake.gguf_file import (
    MAGIC,
    MAX_DIMENSIONS,
    MAX_NAME,
    GGUFFile,
    GGUFTensor,
    padded,
    part_names,
    read_tensor,
)

__all__ = ["PatchedTensor", "patch"]

_PREAMBLE = struct.Struct("<4sIQQ")


@dataclass(frozen=True)
class PatchedTensor:
    """How one tensor was written, measured from the bytes of the output.

    `surviving_share` and `noise` are those of `bake.export.requantise`, weighted `by_inputs`
    where their second moment was given; with `feedback` roundings made good each other.
    `residual` is the largest of the edits' own residuals, each
    alone on the base with the writing error of all of them laid on it. A new
    tensor has no `base_type`.
    """

    name: str
    base_type: GGMLQuantizationType | None
    written_type: GGMLQuantizationType
    surviving_share: float
    noise: float
    residual: float
    by_inputs: bool = False
    feedback: bool = False


@dataclass(frozen=True)
class _Asked:
    """What `patch` is asked for."""

    base: GGUFFile
    edits: Mapping[str, Sequence[Edit]]
    edited_type: EditedType
    created: Mapping[str, CreatedTensor]
    renamed: Mapping[str, str]
    inputs: Mapping[str, Tensor]
    progress: Callable[[int], None]

    def names(self, part: GGUFFile) -> list[str]:
        """The tensors of a part of the output, in order, by their names in the base."""
        follow: dict[str, list[str]] = {}
        for tensor in self.created.values():
            follow.setdefault(tensor.beside, []).append(tensor.name)
        return [each for name in part.tensors for each in (name, *follow.get(name, ()))]

    def written(self, name: str) -> str:
        """The name that a tensor is written under."""
        return self.renamed.get(name, name)


def patch(
    base: GGUFFile,
    edits: Mapping[str, Sequence[Edit]],
    output: Path,
    *,
    edited_type: EditedType,
    created: Sequence[CreatedTensor] = (),
    renamed: Mapping[str, str] = MappingProxyType({}),
    pairs: Mapping[str, bytes] = MappingProxyType({}),
    inputs: Mapping[str, Tensor] = MappingProxyType({}),
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[PatchedTensor, ...]:
    """Write `base` with its edited and created tensors to the new file `output`.

    A split base is written to `part_names` of `output`, and its metadata to the first of them.
    Keys are GGUF names, as they are before `renamed` has those that are written where they
    are others. Edits act on the float32 tensor in torch order and compose
    in the given order; the result is written in the first of `ways` that keeps it, or copied
    when it equals the base. `inputs` are the second moments [columns, columns] of what edited
    matrices read, where they are known. Created tensors, F32 or F16, may be edited too, and go
    right behind the tensor `beside` them. `pairs` are keys with their value in bytes, as
    `packed_pair` makes them: they replace those of the base, or are appended. One tensor is in
    memory at a time. `progress` receives the number of bytes of tensors written since its last
    call.

    Returns a measurement of every edited and created tensor, in file order and by the
    name written. Raises `GGUFError` when the base lacks what is edited or has what is
    created, `OutputError` when the output exists or cannot be written, and
    `VerificationError` when `same` does not keep an edit.
    """
    _check(base, edits, edited_type, created, renamed)
    new = {tensor.name: tensor for tensor in created}
    asked = _Asked(base, edits, edited_type, new, renamed, inputs, progress)
    outputs = part_names(output, len(base.files))
    measured: list[PatchedTensor] = []
    placed: list[GGUFTensor] = []
    for number, (part, path) in enumerate(zip(base.files, outputs, strict=True)):
        changed = pairs_of_part(base, number, pairs, len(created))
        try:
            with open_base(part.path) as source, path.open("x+b") as target:
                files = Files(part.path, source, path, target)
                found, reports = _write_part(asked, part, files, changed)
        except FileExistsError as error:
            raise OutputError(
                f"{path}: exists already; choose another path or remove it"
            ) from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise OutputError(
                f"{path}: cannot be written: {reason}; check the folder and its free space"
            ) from error
        placed += [replace(tensor, part=number) for tensor in found]
        measured += reports
    if list(GGUFFile.open(outputs[0]).tensors.values()) != placed:
        raise VerificationError(f"{outputs[0]}: its header does not list the tensors as written")
    return tuple(measured)


def _check(
    base: GGUFFile,
    edits: Mapping[str, Sequence[Edit]],
    edited_type: EditedType,
    created: Sequence[CreatedTensor],
    renamed: Mapping[str, str],
) -> None:
    """Refuse whatever can be refused before a byte is written."""
    _check_type(edited_type)
    new = {tensor.name for tensor in created}
    for name in edits.keys() - new:
        if name not in base.tensors:
            raise GGUFError(
                f"{base.path}: has no tensor {name!r} to edit; "
                f"check that it is the {base.architecture} model you mean"
            )
        if edits[name]:
            _check_way(base, base.tensors[name], edited_type)
    for tensor in created:
        name = tensor.name
        if name in base.tensors:
            raise GGUFError(f"{base.path}: has a tensor {name!r} already; edit it instead")
        if tensor.beside not in base.tensors:
            raise GGUFError(f"{base.path}: has no tensor {tensor.beside!r}, which {name!r} follows")
        if not 1 <= len(tensor.shape) <= MAX_DIMENSIONS or 0 in tensor.shape:
            raise GGUFError(f"the new tensor {name!r} has the shape {list(tensor.shape)}")
    for name in (renamed.get(name, name) for name in (*base.tensors, *new)):
        if not 0 < len(name.encode()) <= MAX_NAME or "\0" in name:
            raise GGUFError(f"{name!r} is no tensor name: GGUF allows 1 to {MAX_NAME} bytes")


def _check_type(edited_type: EditedType) -> None:
    """Refuse a type that ggml does not write, or not without an importance matrix."""
    if not isinstance(edited_type, GGMLQuantizationType):
        return
    if edited_type not in WRITABLE:
        allowed = ", ".join(kind.name.lower() for kind in WRITABLE if not needs_importance(kind))
        raise GGUFError(
            f"edited tensors cannot be written as {edited_type.name}; "
            f"choose auto, same, or one of {allowed}"
        )
    if needs_importance(edited_type):
        raise GGUFError(
            f"edited tensors cannot be written as {edited_type.name}, which needs an importance "
            "matrix; choose auto"
        )


def _check_way(base: GGUFFile, tensor: GGUFTensor, edited_type: EditedType) -> None:
    name, own = tensor.name, tensor.type.name
    if len(tensor.shape) < 2 and tensor.type not in FLOATS:
        raise GGUFError(
            f"{base.path}: the vector {name!r} is of type {own}, which cannot be "
            "written; start from a file that keeps its vectors in F32"
        )
    way = ways(tensor, edited_type)[0]
    if way.feedback and find_lattice(way.kind) is None:
        raise GGUFError(
            f"{base.path}: tensor {name!r} is of type {own}, in which several weights share a "
            "code, so an edit cannot be rounded weight by weight; choose auto in place of same"
        )


def _write_part(
    asked: _Asked, part: GGUFFile, files: Files, pairs: Mapping[str, bytes]
) -> tuple[list[GGUFTensor], list[PatchedTensor]]:
    """Write one file; return its tensors as they lie there, and how the touched ones are."""
    target, names = files.target, asked.names(part)
    shapes = {name: tensor.shape for name, tensor in part.tensors.items()}
    shapes |= {name: tensor.shape for name, tensor in asked.created.items()}
    listing_size = sum(
        8 + len(asked.written(name).encode()) + 4 + 8 * len(shapes[name]) + 12 for name in names
    )
    metadata = [pairs.get(key, span) for key, span in part.pairs.items()]
    metadata += [pair for key, pair in pairs.items() if key not in part.pairs]
    metadata_size = sum(len(one) if isinstance(one, bytes) else one.nbytes for one in metadata)
    data_start = end = padded(_PREAMBLE.size + metadata_size + listing_size, part.alignment)
    placed: list[GGUFTensor] = []
    measured: list[PatchedTensor] = []
    for name in names:
        if name in asked.created:
            record, report = _create(files, end, asked.created[name], asked.edits.get(name, ()))
        elif asked.edits.get(name):
            record, report = _edit(asked, files, end, name)
        else:
            record, report = replace(part.tensors[name], offset=end), None
            copy(files, span_of(part.tensors[name]), end)
        if report:
            measured.append(replace(report, name=asked.written(name)))
        placed.append(replace(record, name=asked.written(name)))
        end = padded(end + record.nbytes, part.alignment)
        asked.progress(record.nbytes)
    target.truncate(end)
    place = _PREAMBLE.size
    for one in metadata:
        if isinstance(one, bytes):
            target.seek(place)
            target.write(one)
            place += len(one)
        else:
            copy(files, one, place)
            place += one.nbytes
    target.seek(place)
    target.write(b"".join(_listed(tensor, data_start) for tensor in placed))
    target.seek(0)
    target.write(_PREAMBLE.pack(MAGIC, part.version, len(placed), len(metadata)))
    target.flush()
    os.fsync(target.fileno())
    return placed, measured


def _edit(asked: _Asked, files: Files, offset: int, name: str) -> tuple[GGUFTensor, PatchedTensor]:
    """Write one edited tensor at `offset`, read it back and measure it."""
    base, edits = asked.base, asked.edits[name]
    old = replace(base.tensors[name], part=0)
    before = base.read(name)
    if not _finite(before):
        raise GGUFError(
            f"{base.path_of(base.tensors[name])}: tensor {name!r} holds what is no number; "
            "download it or convert it again"
        )
    edited = before
    for edit in edits:
        edited = _apply(base, old, edit, edited)
    if torch.equal(edited, before):
        copy(files, span_of(old), offset)
        new, way, found = replace(old, offset=offset), Way(old.type), Survival(1.0, 0.0)
    else:
        _check_finite(files, name, edited, old.type)
        columns = old.shape[-1] if old.shape else 1
        rows = before.reshape(-1, columns), edited.reshape(-1, columns)
        change = Change(files.path, old, *rows, asked.inputs.get(name))
        new, way, found = _requantise(files, offset, change, asked)
        del change, rows
    if len(edits) == 1:
        # Of large tensors there are as few at a time as there can be.
        del edited
    after = read_tensor(files.output, new)
    _check_finite(files, name, after, new.type)
    if len(edits) == 1:
        residual = edits[0].residual(before, after)
    else:
        # One edit may undo another's invariant on purpose, or find nothing left to remove;
        # the writing error of the composition is what can break any of them.
        error = after.sub_(edited)
        residual = max(edit.residual(before, edit.apply(before) + error) for edit in edits)
    measured = (found.share, found.noise, residual, name in asked.inputs, way.feedback)
    return new, PatchedTensor(name, old.type, new.type, *measured)


def _requantise(
    files: Files, offset: int, change: Change, asked: _Asked
) -> tuple[GGUFTensor, Way, Survival]:
    """Write a change in the first way that keeps it, or in the last one."""
    possible = ways(change.tensor, asked.edited_type, change.gram is not None)
    if max(map(abs, change.after.aminmax())) > LARGEST:
        possible = tuple(way for way in possible if way.kind in FLOATS)
        if not possible:
            kind = ways(change.tensor, asked.edited_type)[0].kind
            raise _not_finite(files, change.tensor.name, kind)
    for way in possible:
        last = way is possible[-1]
        if not last and change.hopeless(way):
            continue
        files.target.seek(offset)
        for stored in change.encoded(way):
            files.target.write(stored.data)
        files.target.flush()
        rows, columns = change.after.shape
        nbytes = rows * row_bytes(way.kind, columns)
        new = replace(change.tensor, type=way.kind, offset=offset, nbytes=nbytes)
        found = change.survival(files.output, new)
        if last or found.good:
            break
    if asked.edited_type == "same" and way.feedback and not found.noise <= MOST_NOISE_SAME:
        raise VerificationError(
            f"{files.output}: {change.tensor.name}: of the edit {found.share:.0%} survives in "
            f"{way.kind.name}, with noise of {found.noise:.0%} where same allows "
            f"{MOST_NOISE_SAME:.0%}; set export.gguf.edited_type to auto"
        )
    return new, way, found


def _apply(base: GGUFFile, tensor: GGUFTensor, edit: Edit, weight: Tensor) -> Tensor:
    try:
        edited = edit.apply(weight)
        if edited.shape == weight.shape:
            return edited
        reason = f"the result has the shape {list(edited.shape)}"
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
    fields = getattr(edit, "__dict__", {}).items()
    operands = [f"{k} {list(v.shape)}" for k, v in fields if isinstance(v, Tensor)]
    raise GGUFError(
        f"{base.path}: tensor {tensor.name!r} {list(tensor.shape)} does not fit "
        f"{type(edit).__name__} ({', '.join(operands)}): {reason}; "
        "check that the edit was made for this model"
    )


def _create(
    files: Files, offset: int, tensor: CreatedTensor, edits: Sequence[Edit]
) -> tuple[GGUFTensor, PatchedTensor]:
    """Write one new tensor at `offset`, read it back and measure it."""
    kind = GGMLQuantizationType[tensor.dtype]
    wanted = apply_all(edits, tensor.filled())
    _check_finite(files, tensor.name, wanted, kind)
    rows = wanted.reshape(-1, tensor.shape[-1])
    nbytes = rows.shape[0] * row_bytes(kind, rows.shape[1])
    new = GGUFTensor(tensor.name, kind, tensor.shape, offset, nbytes)
    change = Change(files.output, new, torch.zeros_like(rows), rows, None)
    files.target.seek(offset)
    for stored in change.encoded(Way(kind)):
        files.target.write(stored.data)
    files.target.flush()
    found = change.survival(files.output, new)
    if not found.noise < torch.inf:
        raise _not_finite(files, tensor.name, kind)
    return new, PatchedTensor(tensor.name, None, kind, found.share, found.noise, found.noise)


def _check_finite(files: Files, name: str, tensor: Tensor, kind: GGMLQuantizationType) -> None:
    if not _finite(tensor):
        raise _not_finite(files, name, kind)


def _finite(tensor: Tensor) -> bool:
    """Whether all is finite, without a copy of it; what is no number is its own minimum."""
    return not tensor.numel() or all(math.isfinite(one) for one in tensor.aminmax())


def _not_finite(files: Files, name: str, kind: GGMLQuantizationType) -> GGUFError:
    return GGUFError(
        f"{files.output}: tensor {name!r} is not finite as {kind.name}; "
        "weaken the edit or choose a wider type"
    )


def _listed(tensor: GGUFTensor, data_start: int) -> bytes:
    """Return a tensor's entry in the header (ggml's include/gguf.h, lines 16 to 21)."""
    dimensions = tuple(reversed(tensor.shape))
    return packed_string(tensor.name) + struct.pack(
        f"<I{len(dimensions)}QIQ",
        len(dimensions),
        *dimensions,
        tensor.type,
        tensor.offset - data_start,
    )
