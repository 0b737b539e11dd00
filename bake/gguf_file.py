"""The read side of a GGUF file: its header, checked in full, and one tensor at a time.

The header may come from a stranger. Nothing in it is believed before it is compared
with the size of the file: every claim that does not hold raises a `GGUFError` of one
line, and no claim sets the size of an allocation. The format is described in ggml's
`include/gguf.h`, lines 1 to 32; the checks follow `gguf_init_from_reader` in ggml's
`src/gguf.cpp`, so a file that opens here has a header that llama.cpp accepts too.
"""

import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from torch import Tensor

from bake.errors import GGUFError

__all__ = ["SCALARS", "GGUFArray", "GGUFFile", "GGUFTensor", "Span", "padded", "read_tensor"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_ENTRIES = 1 << 20
"""Most tensors, and most key/value pairs, of one file; the largest models have thousands."""
MAX_KEY = (1 << 16) - 1
MAX_STRING = MAX_STRINGS = 1 << 24
"""Most bytes of one string, most strings of one array; in use: chat templates, vocabularies."""
MAX_NAME = 63
"""Longest tensor name, in bytes: GGML_MAX_NAME less its terminator (ggml.h, line 229)."""
MAX_DIMENSIONS = 4

_WINDOW = 1 << 20
_LENGTH = struct.Struct("<Q")
_INTEGER = struct.Struct("<I")
_SMALLEST_PAIR = 8 + 1 + 4 + 1
_SMALLEST_TENSOR = 8 + 1 + 4 + 4 + 8
SCALARS: Mapping[GGUFValueType, struct.Struct] = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: _INTEGER,
    GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.BOOL: struct.Struct("<?"),
    GGUFValueType.UINT64: _LENGTH,
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
}
_AGAIN = "download it or convert it again"


@dataclass(frozen=True)
class Span:
    """A range of bytes of a file, both in bytes: where it starts and how long it is."""

    start: int
    nbytes: int


@dataclass(frozen=True)
class GGUFArray:
    """An array in the metadata, by its type and length; its elements stay on disk."""

    element_type: GGUFValueType
    count: int


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies: shape in torch order (a matrix is [out, in]), offset in the file."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """The header of a GGUF file; no tensor is in memory and no file is held open.

    `metadata` has every scalar and string, and a `GGUFArray` for each array. `pairs`
    are the bytes of each key with its value, `metadata_range` those of all of them.
    `tensors` are in file order, which is also the order of their data, each starting
    at a multiple of `alignment` bytes after `data_start`.
    """

    path: Path
    version: int
    architecture: str
    metadata: Mapping[str, object]
    pairs: Mapping[str, Span]
    metadata_range: Span
    tensors: Mapping[str, GGUFTensor]
    alignment: int
    data_start: int

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "GGUFFile":
        """Read and check a header; `GGUFError` unless it is a whole GGUF in this one file."""
        where = Path(path)
        with _reading(where) as (file, size):
            return _parse(_Cursor(where, file, size))

    def read(self, name: str) -> Tensor:
        """Return one tensor as `read_tensor` does; `GGUFError` also when it is not there."""
        if name not in self.tensors:
            raise GGUFError(
                f"{self.path}: has no tensor {name!r}; "
                f"check that it is the {self.architecture} model you mean"
            )
        return read_tensor(self.path, self.tensors[name])

    def array(self, key: str) -> list[Any]:
        """Return the elements of an array of numbers or booleans in the metadata."""
        found = self.metadata[key]
        assert isinstance(found, GGUFArray)
        scalar, pair = SCALARS[found.element_type], self.pairs[key]
        size = found.count * scalar.size
        with _reading(self.path) as (file, _):
            # The elements are the last bytes of their pair.
            file.seek(pair.start + pair.nbytes - size)
            stored = file.read(size)
        if len(stored) != size:
            raise GGUFError(f"{self.path}: ends inside the value of {key!r}; {_AGAIN}")
        return [each for (each,) in scalar.iter_unpack(stored)]


def read_tensor(path: Path, tensor: GGUFTensor) -> Tensor:
    """Read the bytes of one tensor and dequantise them: float32, in torch order.

    Raises `GGUFError` when the file ends before the tensor does, or when gguf-py
    cannot dequantise its type (gguf/quants.py, `dequantize`).
    """
    with _reading(path) as (file, size):
        # The header was checked against the size at opening; the file may have shrunk since.
        there = max(0, min(tensor.nbytes, size - tensor.offset))
        file.seek(tensor.offset)
        stored = np.fromfile(file, dtype=np.uint8, count=there)
    if stored.size != tensor.nbytes:
        raise GGUFError(f"{path}: ends before tensor {tensor.name!r} does; {_AGAIN}")
    rows = stored.reshape(prod(tensor.shape[:-1]), -1)
    try:
        # A scale that is not finite is the file's own matter; numpy need not warn of it.
        with np.errstate(invalid="ignore", over="ignore"):
            values = dequantize(rows, tensor.type)
    except NotImplementedError as error:
        raise GGUFError(
            f"{path}: tensor {tensor.name!r} is of type {tensor.type.name}, which gguf-py "
            "cannot turn into numbers; start from an F16, BF16 or Q8_0 file of this model"
        ) from error
    return torch.from_numpy(values.reshape(tensor.shape))


@contextmanager
def _reading(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file for reading, with its size in bytes; OSError becomes GGUFError."""
    try:
        # A pipe would block on opening, so what the path is comes first.
        if "\0" in str(path) or not stat.S_ISREG(path.stat().st_mode):
            raise GGUFError(f"{str(path)!r} is not a file; give the path of a .gguf file")
        with path.open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise GGUFError(
            f"{path}: cannot be read: {error.strerror or error}; check the path"
        ) from error


class _Cursor:
    """Goes forward through a header, a window of the file at a time, never past its end."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.size = size
        self.position = 0
        self._file = file
        self._window = b""
        self._window_start = 0

    def fail(self, what: str, remedy: str = _AGAIN) -> NoReturn:
        raise GGUFError(f"{self.path}: {what[:240]}; {remedy}")

    def require(self, nbytes: int, what: str) -> None:
        """Stop unless `nbytes` more bytes are in the file."""
        left = self.size - self.position
        if nbytes > left:
            self.fail(f"{what} needs {nbytes} bytes where the file has {left} left")

    def take(self, nbytes: int, what: str) -> bytes:
        self.require(nbytes, what)
        begin = self.position - self._window_start
        if begin + nbytes > len(self._window):
            self._refill(nbytes, what)
            begin = 0
        self.position += nbytes
        return self._window[begin : begin + nbytes]

    def integer(self, what: str) -> int:
        return int(_INTEGER.unpack(self.take(4, what))[0])

    def length(self, what: str) -> int:
        return int(_LENGTH.unpack(self.take(8, what))[0])

    def string(self, limit: int, what: str) -> bytes:
        length = self.length(what)
        if length > limit:
            self.fail(f"{what} claims {length} bytes, more than the {limit} allowed")
        return self.take(length, what)

    def skip_strings(self, count: int, what: str) -> None:
        """Go past `count` strings without making them."""
        self.require(8 * count, what)
        if count > MAX_STRINGS:
            self.fail(f"{what} claims {count} strings, more than the {MAX_STRINGS} allowed")
        # A vocabulary is the bulk of a header, so this loop keeps to local names.
        position, size = self.position, self.size
        window, start = self._window, self._window_start
        unpack = _LENGTH.unpack_from
        for _ in range(count):
            if position + 8 > start + len(window):
                self.position = position
                self.require(8, what)
                self._refill(8, what)
                window, start = self._window, self._window_start
            length = unpack(window, position - start)[0]
            position += 8 + length
            if position > size:
                self.position = position - length
                self.require(length, what)
        self.position = position

    def _refill(self, nbytes: int, what: str) -> None:
        """Move the window to the position; `require` has already bounded `nbytes`."""
        self._file.seek(self.position)
        self._window = self._file.read(max(nbytes, _WINDOW))
        self._window_start = self.position
        if len(self._window) < nbytes:
            self.fail(f"the file was cut while {what} was read")


def _parse(cursor: _Cursor) -> GGUFFile:
    version, tensor_count, pair_count = _parse_preamble(cursor)
    start = cursor.position
    metadata: dict[str, object] = {}
    pairs: dict[str, Span] = {}
    for index in range(pair_count):
        begin = cursor.position
        key, value = _parse_pair(cursor, index)
        if key in metadata:
            cursor.fail(f"the metadata key {key!r} is there twice")
        metadata[key] = value
        pairs[key] = Span(begin, cursor.position - begin)
    metadata_range = Span(start, cursor.position - start)
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        cursor.fail("has no text under the metadata key 'general.architecture'")
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment.bit_count() != 1 or alignment > MAX_ALIGNMENT:
        cursor.fail(f"general.alignment is {alignment}, not a power of two up to {MAX_ALIGNMENT}")
    split_count = metadata.get("split.count", 1)
    if isinstance(split_count, int) and split_count > 1:
        cursor.fail(
            f"is one of {split_count} parts of a split GGUF, which bake does not read yet",
            "join them first with `llama-gguf-split --merge`",
        )
    tensors: dict[str, GGUFTensor] = {}
    for index in range(tensor_count):
        tensor = _parse_tensor(cursor, index)
        if tensor.name in tensors:
            cursor.fail(f"the tensor name {tensor.name!r} is there twice")
        tensors[tensor.name] = tensor
    data_start = padded(cursor.position, alignment)
    _check_places(cursor, tensors.values(), alignment, data_start)
    placed = {
        name: replace(tensor, offset=data_start + tensor.offset) for name, tensor in tensors.items()
    }
    return GGUFFile(
        path=cursor.path,
        version=version,
        architecture=architecture,
        metadata=MappingProxyType(metadata),
        pairs=MappingProxyType(pairs),
        metadata_range=metadata_range,
        tensors=MappingProxyType(placed),
        alignment=alignment,
        data_start=data_start,
    )


def _parse_preamble(cursor: _Cursor) -> tuple[int, int, int]:
    """Return the version, the number of tensors and the number of key/value pairs."""
    magic = cursor.take(4, "the magic number")
    if magic != MAGIC:
        cursor.fail(f"starts with {magic!r}, not with {MAGIC!r}", "give the path of a GGUF file")
    version = cursor.integer("the version")
    if version and version & 0xFFFF == 0:
        cursor.fail("is big-endian", "convert it with `gguf-convert-endian` first")
    if version not in VERSIONS:
        cursor.fail(f"is GGUF version {version}; bake reads versions 2 and 3")
    tensor_count = cursor.length("the number of tensors")
    pair_count = cursor.length("the number of metadata pairs")
    for count, smallest, what in (
        (pair_count, _SMALLEST_PAIR, "metadata pairs"),
        (tensor_count, _SMALLEST_TENSOR, "tensors"),
    ):
        if count > MAX_ENTRIES:
            cursor.fail(f"claims {count} {what}, more than the {MAX_ENTRIES} allowed")
        cursor.require(count * smallest, f"the list of {count} {what}")
    return version, tensor_count, pair_count


def _parse_pair(cursor: _Cursor, index: int) -> tuple[str, object]:
    key = _text(cursor, cursor.string(MAX_KEY, f"metadata key {index}"), f"metadata key {index}")
    what = f"the value of {key!r}"
    value_type = _value_type(cursor, what)
    if key == "general.alignment" and value_type is not GGUFValueType.UINT32:
        cursor.fail(f"{key} is of type {value_type.name}, not UINT32")
    if value_type in SCALARS:
        scalar = SCALARS[value_type]
        return key, scalar.unpack(cursor.take(scalar.size, what))[0]
    if value_type is GGUFValueType.STRING:
        # Nobody but llama.cpp has to agree on a value's encoding: its bytes are copied.
        return key, cursor.string(MAX_STRING, what).decode("utf-8", "replace")
    element_type = _value_type(cursor, what)
    count = cursor.length(what)
    if element_type is GGUFValueType.ARRAY:
        cursor.fail(f"{what} is an array of arrays, which llama.cpp does not load")
    if element_type is GGUFValueType.STRING:
        cursor.skip_strings(count, what)
    else:
        nbytes = count * SCALARS[element_type].size
        cursor.require(nbytes, what)
        cursor.position += nbytes
    return key, GGUFArray(element_type, count)


def _parse_tensor(cursor: _Cursor, index: int) -> GGUFTensor:
    """Return one tensor as listed: its offset is still relative to the data."""
    what = f"tensor {index}"
    name = _text(cursor, cursor.string(MAX_NAME, f"the name of {what}"), f"the name of {what}")
    what = f"tensor {name!r}"
    dimension_count = cursor.integer(what)
    if dimension_count > MAX_DIMENSIONS:
        cursor.fail(f"{what} claims {dimension_count} dimensions, more than {MAX_DIMENSIONS}")
    # GGUF lists the fastest dimension first, torch lists it last.
    shape = tuple(reversed([cursor.length(what) for _ in range(dimension_count)]))
    if 0 in shape:
        cursor.fail(f"{what} has a dimension of 0: {list(shape)}")
    number = cursor.integer(what)
    offset = cursor.length(what)
    try:
        tensor_type = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[tensor_type]
    except (KeyError, ValueError):
        cursor.fail(f"{what} is of the unknown type {number}", "upgrade the gguf package")
    row = shape[-1] if shape else 1
    if row % block:
        cursor.fail(f"{what} has rows of {row}, not a multiple of the {block} of its type")
    return GGUFTensor(name, tensor_type, shape, offset, prod(shape) // block * block_bytes)


def _check_places(
    cursor: _Cursor, listed: Iterable[GGUFTensor], alignment: int, start: int
) -> None:
    """Check that the tensors are aligned, lie one after the other, and end inside the file."""
    expected = 0
    for tensor in listed:
        what = f"tensor {tensor.name!r}"
        if tensor.offset != expected:
            cursor.fail(f"{what} lies at {tensor.offset} of the data, not at {expected}")
        end = start + tensor.offset + tensor.nbytes
        if end > cursor.size:
            cursor.fail(f"{what} ends at byte {end} of a file of {cursor.size}")
        expected = padded(tensor.offset + tensor.nbytes, alignment)


def _value_type(cursor: _Cursor, what: str) -> GGUFValueType:
    number = cursor.integer(what)
    try:
        return GGUFValueType(number)
    except ValueError:
        cursor.fail(f"{what} is of the unknown type {number}", "upgrade the gguf package")


def _text(cursor: _Cursor, stored: bytes, what: str) -> str:
    """Decode a name: llama.cpp ends it at a zero byte, so it may not hold one."""
    try:
        text = stored.decode("utf-8")
    except UnicodeDecodeError:
        cursor.fail(f"{what} is not UTF-8: {stored[:32]!r}")
    if not text or "\0" in text:
        cursor.fail(f"{what} is empty or holds a zero byte")
    return text


def padded(position: int, alignment: int) -> int:
    """Return the first multiple of `alignment` from `position` on."""
    return (position + alignment - 1) // alignment * alignment
