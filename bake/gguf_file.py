"""The read side of a GGUF file: its header, checked in full, and one tensor at a time.

A model may be split into several files, `NAME-00001-of-00003.gguf` and so on, as
`llama-gguf-split` writes them: each has a header of its own, and the metadata is in the first.

The header may come from a stranger. Nothing in it is believed before it is compared
with the size of the file: every claim that does not hold raises a `GGUFError` of one
line, and no claim sets the size of an allocation. The format is described in ggml's
`include/gguf.h`, lines 1 to 32; the checks follow `gguf_init_from_reader` in ggml's
`src/gguf.cpp`, so a file that opens here has a header that llama.cpp accepts too.
"""

import os
import re
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
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from torch import Tensor

from bake.errors import GGUFError
from bake.ggml import can_dequantise, dequantised, row_slices

__all__ = [
    "SCALARS",
    "SPLIT_COUNT",
    "SPLIT_NUMBER",
    "SPLIT_TENSORS",
    "GGUFArray",
    "GGUFFile",
    "GGUFTensor",
    "Span",
    "padded",
    "part_names",
    "parts_named",
    "read_stored",
    "read_tensor",
]

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
SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
"""Keys of every part of a split file (llama.cpp's src/llama-model-loader.cpp)."""

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
_PART = "-{number:05d}-of-{count:05d}.gguf"
"""How the name of a part ends (llama.cpp's src/llama.cpp, `llama_split_path`)."""


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
    """Where one tensor lies: shape in torch order (a matrix is [out, in]), offset in the file.

    `part` is the file's place among the parts of a split model.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int = 0


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """The header of a GGUF file; no tensor is in memory and no file is held open.

    `metadata` has every scalar and string, and a `GGUFArray` for each array. `pairs`
    are the bytes of each key with its value, `metadata_range` those of all of them.
    `tensors` are in file order, which is also the order of their data, each starting
    at a multiple of `alignment` bytes after `data_start`. A split model is its first file,
    with the tensors of all `parts`; each of these is a file by itself.
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
    parts: tuple["GGUFFile", ...] = ()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "GGUFFile":
        """Read and check a header, or those of all parts of a split model, by its first part.

        Raises `GGUFError` unless it is a whole GGUF.
        """
        first = _open_one(Path(path))
        return _joined(first) if SPLIT_COUNT in first.metadata else first

    @property
    def files(self) -> tuple["GGUFFile", ...]:
        """The parts of a split model, or this one file."""
        return self.parts or (self,)

    @property
    def is_quantised(self) -> bool:
        """Whether any tensor is of a type of blocks."""
        return any(GGML_QUANT_SIZES[one.type][0] > 1 for one in self.tensors.values())

    def path_of(self, tensor: GGUFTensor) -> Path:
        """The file that a tensor lies in."""
        return self.files[tensor.part].path

    def read(self, name: str) -> Tensor:
        """Return one tensor as `read_tensor` does; `GGUFError` also when it is not there."""
        if name not in self.tensors:
            raise GGUFError(
                f"{self.path}: has no tensor {name!r}; "
                f"check that it is the {self.architecture} model you mean"
            )
        tensor = self.tensors[name]
        return read_tensor(self.path_of(tensor), tensor)

    def array(self, key: str) -> list[Any]:
        """Return the elements of an array in the metadata."""
        found, pair = self.metadata[key], self.pairs[key]
        assert isinstance(found, GGUFArray)
        if found.element_type is GGUFValueType.STRING:
            return self._strings(key, found.count, pair)
        scalar = SCALARS[found.element_type]
        size = found.count * scalar.size
        with _reading(self.path) as (file, _):
            # The elements are the last bytes of their pair.
            file.seek(pair.start + pair.nbytes - size)
            stored = file.read(size)
        if len(stored) != size:
            raise GGUFError(f"{self.path}: ends inside the value of {key!r}; {_AGAIN}")
        return [each for (each,) in scalar.iter_unpack(stored)]

    def _strings(self, key: str, count: int, pair: Span) -> list[str]:
        with _reading(self.path) as (file, size):
            cursor = _Cursor(self.path, file, size)
            # The key with its length, the types of the array and of its elements, their number.
            cursor.position = pair.start + 8 + len(key.encode()) + 4 + 4 + 8
            what = f"the value of {key!r}"
            return [
                cursor.string(MAX_STRING, what).decode("utf-8", "replace") for _ in range(count)
            ]


def read_tensor(path: Path, tensor: GGUFTensor) -> Tensor:
    """Read the bytes of one tensor and dequantise them: float32, in torch order.

    Raises `GGUFError` when the file ends before the tensor does, or when ggml has no
    numbers for its type.
    """
    if not can_dequantise(tensor.type):
        raise GGUFError(
            f"{path}: tensor {tensor.name!r} is of type {tensor.type.name}, which ggml "
            "cannot turn into numbers; start from an F16, BF16 or Q8_0 file of this model"
        )
    columns = tensor.shape[-1] if tensor.shape else 1
    values = np.empty((prod(tensor.shape[:-1]), columns), dtype=np.float32)
    for rows in row_slices(*values.shape):
        values[rows] = dequantised(read_stored(path, tensor, rows), tensor.type)
    return torch.from_numpy(values.reshape(tensor.shape))


def read_stored(path: Path, tensor: GGUFTensor, rows: slice) -> npt.NDArray[np.uint8]:
    """Read the bytes of some rows of a tensor: [rows, bytes of a row]."""
    length = tensor.nbytes // prod(tensor.shape[:-1])
    start, count = tensor.offset + rows.start * length, (rows.stop - rows.start) * length
    with _reading(path) as (file, size):
        # The header was checked against the size at opening; the file may have shrunk since.
        file.seek(start)
        stored = np.fromfile(file, dtype=np.uint8, count=max(0, min(count, size - start)))
    if stored.size != count:
        raise GGUFError(f"{path}: ends before tensor {tensor.name!r} does; {_AGAIN}")
    return stored.reshape(-1, length)


def part_names(path: Path, count: int) -> tuple[Path, ...]:
    """The files that a model of this file name has in `count` parts: itself for one part."""
    if count < 2:
        return (path,)
    return tuple(
        path.with_name(path.stem + _PART.format(number=number, count=count))
        for number in range(1, count + 1)
    )


def parts_named(path: Path) -> int:
    """How many parts a file's name says that its model has: 1 unless it is one of several."""
    found = re.search(r"-\d{5}-of-(\d{5})\.gguf$", path.name)
    return int(found[1]) if found else 1


def _open_one(path: Path) -> GGUFFile:
    with _reading(path) as (file, size):
        return _parse(_Cursor(path, file, size))


def _joined(first: GGUFFile) -> GGUFFile:
    """Open all parts of a split model. A file that was merged again has a count of 0."""
    path, count = first.path, first.metadata[SPLIT_COUNT]
    if not isinstance(count, int) or count < 2:
        return first
    ending = _PART.format(number=1, count=count)
    number = first.metadata.get(SPLIT_NUMBER)
    if number != 0 or not path.name.endswith(ending):
        raise GGUFError(
            f"{path}: its header says that it is one of {count} parts (number {number}, from 0); "
            f"give the first, whose name ends in {ending}"
        )
    start = path.name.removesuffix(ending)
    parts, tensors = [first], dict(first.tensors)
    for place in range(1, count):
        other = path.with_name(start + _PART.format(number=place + 1, count=count))
        if not other.is_file():
            raise GGUFError(
                f"{path}: is one of {count} parts, and {other.name} is missing; "
                "put all parts into one folder"
            )
        part = _open_one(other)
        found = (part.metadata.get(SPLIT_NUMBER), part.metadata.get(SPLIT_COUNT))
        if found != (place, count):
            raise GGUFError(
                f"{other}: should be number {place} (from 0) of {count} parts by its name, and "
                f"its header says {found[0]} of {found[1]}; download it again"
            )
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise GGUFError(
                    f"{other}: the tensor name {name[:99]!r} is in another part too; {_AGAIN}"
                )
            tensors[name] = replace(tensor, part=place)
        parts.append(part)
    claimed = first.metadata.get(SPLIT_TENSORS)
    if claimed != len(tensors):
        raise GGUFError(
            f"{path}: {SPLIT_TENSORS} is {claimed}, and the parts have {len(tensors)} tensors; "
            "download them again"
        )
    return replace(first, tensors=MappingProxyType(tensors), parts=tuple(parts))


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
    number, count = metadata.get(SPLIT_NUMBER), metadata.get(SPLIT_COUNT)
    if architecture is None and isinstance(count, int) and count > 1 and number != 0:
        architecture = ""  # Of a split model only the first part says it.
    elif architecture is None and metadata.get("general.type") == "imatrix":
        architecture = ""  # An importance matrix is of no architecture.
    elif not isinstance(architecture, str) or not architecture:
        cursor.fail("has no text under the metadata key 'general.architecture'")
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment.bit_count() != 1 or alignment > MAX_ALIGNMENT:
        cursor.fail(f"general.alignment is {alignment}, not a power of two up to {MAX_ALIGNMENT}")
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
