"""Patch a GGUF file: edits on some tensors, new biases and blocks, the rest byte for byte.

A quantised weight lies on its lattice, so an edit below half a step rounds back when
it is written in the base's own 4-bit type; an edited matrix is therefore written in a
type of at least 8 bits, and what survived of the edit is measured from the output.

The output is written with its header last: until then it is no GGUF at all. The order
and alignment of the data follow gguf-py's `gguf_writer.py` (`write_tensors_to_file`).
"""

import hashlib
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import quantize
from torch import Tensor

from bake.edits import CreatedTensor, Edit, apply_all
from bake.errors import GGUFError, OutputError, VerificationError
from bake.gguf_file import (
    MAGIC,
    MAX_DIMENSIONS,
    MAX_NAME,
    SCALARS,
    GGUFFile,
    GGUFTensor,
    Span,
    padded,
    read_tensor,
)

__all__ = ["WRITABLE_TYPES", "PatchedTensor", "compare", "packed_pair", "patch", "written_type"]

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
WRITABLE_TYPES = (F32, F16, GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0)
"""What `gguf.quants.quantize` writes with at least 8 bits a weight (gguf/quants.py)."""

_FLOATS = WRITABLE_TYPES[:3]
_CHUNK = 1 << 23
_PREAMBLE = struct.Struct("<4sIQQ")


@dataclass(frozen=True)
class PatchedTensor:
    """How one tensor was written, measured from the bytes of the output.

    With dW the edit in float32 and dW' what the output differs from the base by:
    `surviving_share` is <dW', dW> / <dW, dW>, 1 is all of it; `noise` is
    |dW' - dW| / |dW|; `residual` is the largest of the edits' own residuals, each
    alone on the base with the writing error dW' - dW of all of them laid on it. A new
    tensor has no `base_type`.
    """

    name: str
    base_type: GGMLQuantizationType | None
    written_type: GGMLQuantizationType
    surviving_share: float
    noise: float
    residual: float


@dataclass(frozen=True)
class _Files:
    """The base and the output, both open: what is copied from where to where."""

    base: GGUFFile
    source: BinaryIO
    output: Path
    target: BinaryIO


def patch(
    base: GGUFFile,
    edits: Mapping[str, Sequence[Edit]],
    output: Path,
    *,
    edited_type: GGMLQuantizationType,
    created: Sequence[CreatedTensor] = (),
    renamed: Mapping[str, str] = MappingProxyType({}),
    pairs: Mapping[str, bytes] = MappingProxyType({}),
    progress: Callable[[int], None] | None = None,
) -> tuple[PatchedTensor, ...]:
    """Write `base` with its edited and created tensors to the new file `output`.

    Keys are GGUF names, as they are before `renamed` has those that are written where they
    are others. Edits act on the float32 tensor in torch order and compose
    in the given order; the result is written as `written_type` says, or copied when
    it equals the base. Created tensors, F32 or F16, may be edited too, and go right behind
    the tensor `beside` them. `pairs` are keys with their value in bytes, as `packed_pair`
    makes them: they replace those of the base, or are appended. One tensor is in memory at a time.
    `progress` receives the number of bytes of tensors written since its last call.

    Returns a measurement of every edited and created tensor, in file order and by the
    name written. Raises `GGUFError` when the base lacks what is edited or has what is
    created, and `OutputError` when the output exists or cannot be written.
    """
    _check(base, edits, edited_type, created, renamed)
    new = {tensor.name: tensor for tensor in created}
    names = _order(base, created)
    written = {name: renamed.get(name, name) for name in names}
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    shapes |= {name: tensor.shape for name, tensor in new.items()}
    listing_size = sum(
        8 + len(written[name].encode()) + 4 + 8 * len(shapes[name]) + 12 for name in names
    )
    metadata = [pairs.get(key, span) for key, span in base.pairs.items()]
    metadata += [pair for key, pair in pairs.items() if key not in base.pairs]
    metadata_size = sum(len(one) if isinstance(one, bytes) else one.nbytes for one in metadata)
    head_size = _PREAMBLE.size + metadata_size + listing_size
    data_start = end = padded(head_size, base.alignment)
    placed: list[GGUFTensor] = []
    measured: list[PatchedTensor] = []
    try:
        with _open(base.path) as source, output.open("x+b") as target:
            files = _Files(base, source, output, target)
            for name in names:
                if name in new:
                    record, report = _create(files, end, new[name], edits.get(name, ()))
                    measured.append(replace(report, name=written[name]))
                elif edits.get(name):
                    record, report = _edit(files, end, name, edits[name], edited_type)
                    measured.append(replace(report, name=written[name]))
                else:
                    record = replace(base.tensors[name], offset=end)
                    _copy(files, _span(base.tensors[name]), end)
                placed.append(replace(record, name=written[name]))
                end = padded(end + record.nbytes, base.alignment)
                if progress is not None:
                    progress(record.nbytes)
            target.truncate(end)
            place = _PREAMBLE.size
            for one in metadata:
                if isinstance(one, bytes):
                    target.seek(place)
                    target.write(one)
                    place += len(one)
                else:
                    _copy(files, one, place)
                    place += one.nbytes
            target.seek(place)
            target.write(b"".join(_listed(tensor, data_start) for tensor in placed))
            target.seek(0)
            target.write(_PREAMBLE.pack(MAGIC, base.version, len(placed), len(metadata)))
            target.flush()
            os.fsync(target.fileno())
    except FileExistsError as error:
        raise OutputError(f"{output}: exists already; choose another path or remove it") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"{output}: cannot be written: {reason}; check the folder and its free space"
        ) from error
    if list(GGUFFile.open(output).tensors.values()) != placed:
        raise VerificationError(f"{output}: its header does not list the tensors as written")
    return tuple(measured)


def written_type(tensor: GGUFTensor, edited_type: GGMLQuantizationType) -> GGMLQuantizationType:
    """Return the type that an edit of `tensor` is written in.

    Floating-point tensors and vectors keep their type; F16 stands in when the rows do
    not divide into the blocks of `edited_type`.
    """
    if tensor.type in _FLOATS or len(tensor.shape) < 2:
        return tensor.type
    block, _ = GGML_QUANT_SIZES[edited_type]
    return F16 if tensor.shape[-1] % block else edited_type


def compare(
    base: GGUFFile,
    patched: GGUFFile,
    touched: AbstractSet[str],
    renamed: Mapping[str, str] = MappingProxyType({}),
    pairs: Mapping[str, bytes] = MappingProxyType({}),
) -> Mapping[str, str]:
    """Return the sha256 of every tensor outside `touched`, in file order; both files agree on it.

    `renamed` and `pairs` are those of `patch`. Names are those of the base; the hashes have
    those of the patched file. Raises `VerificationError` when such a tensor differs in type,
    shape or bytes, when a tensor of the base or of `touched` is missing, when there is another
    new one, or when a metadata pair is not the base's, or the one of `pairs`.
    """
    for key in sorted(base.pairs.keys() | pairs.keys()):
        if key not in patched.pairs:
            raise VerificationError(f"{patched.path}: lost the metadata key {key!r}")
        now = _digest(patched.path, patched.pairs[key])
        if key in pairs:
            wanted = hashlib.sha256(pairs[key]).hexdigest()
        else:
            wanted = _digest(base.path, base.pairs[key])
        if now != wanted:
            raise VerificationError(f"{patched.path}: the metadata of {key!r} changed")
    planned = {renamed.get(name, name) for name in base.tensors.keys() | touched}
    for name in sorted(planned - patched.tensors.keys()):
        raise VerificationError(f"{patched.path}: lost the tensor {name!r}")
    for name in sorted(patched.tensors.keys() - planned):
        raise VerificationError(f"{patched.path}: has a tensor that was not planned, {name!r}")
    hashes: dict[str, str] = {}
    for old, before in base.tensors.items():
        if old in touched:
            continue
        name = renamed.get(old, old)
        after = patched.tensors[name]
        if (before.type, before.shape) != (after.type, after.shape):
            was, now = (f"{t.type.name} {list(t.shape)}" for t in (before, after))
            raise VerificationError(f"{patched.path}: tensor {name!r} was {was} and is {now}")
        hashes[name] = _digest(base.path, _span(before))
        if _digest(patched.path, _span(after)) != hashes[name]:
            raise VerificationError(f"{patched.path}: tensor {name!r} changed without an edit")
    return MappingProxyType(hashes)


def _check(
    base: GGUFFile,
    edits: Mapping[str, Sequence[Edit]],
    edited_type: GGMLQuantizationType,
    created: Sequence[CreatedTensor],
    renamed: Mapping[str, str],
) -> None:
    """Refuse whatever can be refused before a byte is written."""
    if edited_type not in WRITABLE_TYPES:
        allowed = ", ".join(kind.name.lower() for kind in WRITABLE_TYPES)
        raise GGUFError(
            f"edited tensors cannot be written as {GGMLQuantizationType(edited_type).name}: "
            f"it would lose the edit or cannot be written; choose one of {allowed}"
        )
    new = {tensor.name for tensor in created}
    for name in edits.keys() - new:
        if name not in base.tensors:
            raise GGUFError(
                f"{base.path}: has no tensor {name!r} to edit; "
                f"check that it is the {base.architecture} model you mean"
            )
        kind = written_type(base.tensors[name], edited_type)
        if edits[name] and kind not in WRITABLE_TYPES:
            raise GGUFError(
                f"{base.path}: the vector {name!r} is of type {kind.name}, which cannot be "
                "written; start from a file that keeps its vectors in F32"
            )
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


def _order(base: GGUFFile, created: Sequence[CreatedTensor]) -> list[str]:
    follow: dict[str, list[str]] = {}
    for tensor in created:
        follow.setdefault(tensor.beside, []).append(tensor.name)
    return [each for name in base.tensors for each in (name, *follow.get(name, ()))]


def _edit(
    files: _Files,
    offset: int,
    name: str,
    edits: Sequence[Edit],
    edited_type: GGMLQuantizationType,
) -> tuple[GGUFTensor, PatchedTensor]:
    """Write one edited tensor at `offset`, read it back and measure it."""
    old = files.base.tensors[name]
    before = files.base.read(name)
    edited = before
    for edit in edits:
        edited = _apply(files.base, old, edit, edited)
    if torch.equal(edited, before):
        _copy(files, _span(old), offset)
        new = replace(old, offset=offset)
    else:
        new = _write(files.target, offset, name, edited, written_type(old, edited_type))
    error = _error(files, new, edited)
    # One edit may undo another's invariant on purpose, or find nothing left to remove;
    # the writing error of the composition is what can break any of them.
    residual = max(edit.residual(before, edit.apply(before) + error) for edit in edits)
    share, noise = _survival(error, edited - before)
    return new, PatchedTensor(name, old.type, new.type, share, noise, residual)


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
    files: _Files, offset: int, tensor: CreatedTensor, edits: Sequence[Edit]
) -> tuple[GGUFTensor, PatchedTensor]:
    """Write one new tensor at `offset`, read it back and measure it."""
    kind = GGMLQuantizationType[tensor.dtype]
    wanted = apply_all(edits, tensor.filled())
    new = _write(files.target, offset, tensor.name, wanted, kind)
    share, noise = _survival(_error(files, new, wanted), wanted)
    return new, PatchedTensor(tensor.name, None, kind, share, noise, residual=noise)


def _error(files: _Files, tensor: GGUFTensor, wanted: Tensor) -> Tensor:
    """Return what the output holds for `tensor`, less what was wanted."""
    files.target.flush()
    error = read_tensor(files.output, tensor).sub_(wanted)
    if not torch.isfinite(error).all():
        raise GGUFError(
            f"{files.output}: tensor {tensor.name!r} is not finite as {tensor.type.name}; "
            "weaken the edit or choose a wider type"
        )
    return error


def _survival(error: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Return <dW', dW> / <dW, dW> and |dW' - dW| / |dW|, of dW' = `wanted` + `error`."""
    power = _dot(wanted, wanted)
    if not power:
        return 1.0, 0.0
    return 1 + _dot(error, wanted) / power, (_dot(error, error) / power) ** 0.5


def _write(
    target: BinaryIO, offset: int, name: str, weight: Tensor, kind: GGMLQuantizationType
) -> GGUFTensor:
    """Write a tensor as `kind` at `offset`; what overflows becomes infinite and is found later."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        stored = quantize(weight.detach().cpu().contiguous().numpy(), kind)
    target.seek(offset)
    target.write(stored.data)
    return GGUFTensor(name, kind, tuple(weight.shape), offset, stored.nbytes)


def packed_pair(key: str, kind: GGUFValueType, value: Any) -> bytes:
    """Return a metadata key with its text, its number, or its list of numbers.

    The bytes are those of ggml's include/gguf.h, lines 16 to 21.
    """
    head = _string(key)
    if kind is GGUFValueType.STRING:
        return head + struct.pack("<I", kind) + _string(value)
    if not isinstance(value, list):
        return head + struct.pack("<I", kind) + SCALARS[kind].pack(value)
    head += struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(value))
    return head + b"".join(SCALARS[kind].pack(each) for each in value)


def _listed(tensor: GGUFTensor, data_start: int) -> bytes:
    """Return a tensor's entry in the header (ggml's include/gguf.h, lines 16 to 21)."""
    dimensions = tuple(reversed(tensor.shape))
    return _string(tensor.name) + struct.pack(
        f"<I{len(dimensions)}QIQ",
        len(dimensions),
        *dimensions,
        tensor.type,
        tensor.offset - data_start,
    )


def _copy(files: _Files, span: Span, offset: int) -> None:
    """Copy bytes of the base to `offset`, inside the kernel where the system can."""
    source, target = files.source, files.target
    start, end = span.start, span.start + span.nbytes
    shift = offset - start
    if hasattr(os, "copy_file_range"):
        target.flush()
        # Some file systems cannot; a real fault shows again below, on its own side.
        with suppress(OSError):
            while start < end and (
                count := os.copy_file_range(
                    source.fileno(), target.fileno(), end - start, start, start + shift
                )
            ):
                start += count
    target.seek(start + shift)
    target.writelines(_chunks(source, files.base.path, Span(start, end - start)))


def _chunks(file: BinaryIO, path: Path, span: Span) -> Iterator[bytes]:
    """Yield the bytes of a span; `GGUFError` when the file is shorter or cannot be read."""
    done = 0
    while done < span.nbytes:
        try:
            file.seek(span.start + done)
            chunk = file.read(min(_CHUNK, span.nbytes - done))
        except OSError as error:
            raise GGUFError(f"{path}: cannot be read: {error.strerror}; check the disk") from error
        if not chunk:
            raise GGUFError(f"{path}: became shorter while it was read; leave it alone and retry")
        done += len(chunk)
        yield chunk


def _digest(path: Path, span: Span) -> str:
    digest = hashlib.sha256()
    with _open(path) as file:
        for chunk in _chunks(file, path, span):
            digest.update(chunk)
    return digest.hexdigest()


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise GGUFError(f"{path}: cannot be read: {error.strerror}; check the path") from error


def _span(tensor: GGUFTensor) -> Span:
    return Span(tensor.offset, tensor.nbytes)


def _string(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _dot(left: Tensor, right: Tensor) -> float:
    return float(torch.sum(left * right, dtype=torch.float64))
