"""The bytes of GGUF files: what is copied, compared and packed, without a look at the numbers."""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gguf import GGUFValueType

from bake import copying
from bake.copying import copy_span
from bake.errors import CheckpointError, GGUFError
from bake.gguf_file import (
    SCALARS,
    SPLIT_COUNT,
    SPLIT_NUMBER,
    SPLIT_TENSORS,
    GGUFFile,
    GGUFTensor,
    Span,
)

__all__ = [
    "Files",
    "chunks",
    "copy",
    "open_base",
    "packed_pair",
    "packed_string",
    "pairs_of_part",
    "span_of",
]

_CHUNK = 1 << 23


@dataclass(frozen=True)
class Files:
    """A part of the base and of the output, both open: what is copied from where to where."""

    path: Path
    source: BinaryIO
    output: Path
    target: BinaryIO


def pairs_of_part(
    base: GGUFFile, part: int, pairs: Mapping[str, bytes], new: int
) -> Mapping[str, bytes]:
    """The metadata to replace or append in one part; all parts count the tensors of all.

    One that is a part by its layout alone (`bake.export.split`) has to say so.
    """
    found, own = dict(pairs) if part == 0 else {}, base.files[part].pairs
    count, tensors = len(base.files), len(base.tensors) + new
    if count > 1 and SPLIT_COUNT not in own:
        found[SPLIT_NUMBER] = packed_pair(SPLIT_NUMBER, GGUFValueType.UINT16, part)
        found[SPLIT_COUNT] = packed_pair(SPLIT_COUNT, GGUFValueType.UINT16, count)
    if SPLIT_COUNT in found or (new and SPLIT_TENSORS in own):
        found[SPLIT_TENSORS] = packed_pair(SPLIT_TENSORS, GGUFValueType.INT32, tensors)
    return found


def packed_pair(key: str, kind: GGUFValueType, value: Any) -> bytes:
    """Return a metadata key with its text or number, or its list of texts or of numbers.

    The bytes are those of ggml's include/gguf.h, lines 16 to 21.
    """
    pack = packed_string if kind is GGUFValueType.STRING else SCALARS[kind].pack
    head = packed_string(key)
    if not isinstance(value, list):
        return head + struct.pack("<I", kind) + pack(value)
    head += struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(value))
    return head + b"".join(pack(each) for each in value)


def copy(files: Files, span: Span, offset: int) -> None:
    """Copy bytes of the base to `offset`, inside the kernel where the system can (`copy_span`)."""
    files.target.flush()
    try:
        copy_span(copying.Span(files.path, span.start, files.output, offset, span.nbytes))
    except CheckpointError as error:
        raise GGUFError(str(error)) from error


def chunks(file: BinaryIO, path: Path, span: Span) -> Iterator[bytes]:
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


def open_base(path: Path) -> BinaryIO:
    """Open a file for reading; OSError becomes GGUFError."""
    try:
        return path.open("rb")
    except OSError as error:
        raise GGUFError(f"{path}: cannot be read: {error.strerror}; check the path") from error


def span_of(tensor: GGUFTensor) -> Span:
    """The bytes of a tensor in its file."""
    return Span(tensor.offset, tensor.nbytes)


def packed_string(text: str) -> bytes:
    """A string with its length, as GGUF has it."""
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded
