"""Importance matrices: for each matrix, the mean square of what it reads, by column.

llama.cpp's quantiser weighs roundings by them. Two formats are read: llama.cpp's GGUF, which is
also written (tools/imatrix/imatrix.cpp, `save_imatrix`), and the older `.dat` of the same file
(`save_imatrix_legacy`), which has no magic number: what is no GGUF is read as one.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from gguf import GGUFWriter

from bake.errors import GGUFError
from bake.ggml import Floats
from bake.gguf_file import MAGIC, GGUFArray, GGUFFile

__all__ = ["Importance", "read_importance", "write_importance"]

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNKS, CHUNK_SIZE = (
    "imatrix.datasets",
    "imatrix.chunk_count",
    "imatrix.chunk_size",
)
_INTEGER: Final = struct.Struct("<i")
_MOST_NAME: Final = 1 << 12
_AGAIN: Final = "make it again with llama-imatrix, or set imatrix to text"


@dataclass(frozen=True, eq=False)
class Importance:
    """Sums of squares [experts or 1, columns] and their number of tokens [experts or 1], by tensor.

    `chunks` of `chunk_size` tokens of the `datasets` were read. Of a file in the old format the
    counts are in chunks, which makes no difference to the means.
    """

    sums: Mapping[str, Floats]
    counts: Mapping[str, Floats]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int

    def means(self) -> dict[str, Floats]:
        """What the quantiser takes, by tensor, flat; 1 for an expert that read no token.

        As llama.cpp's tools/quantize/quantize.cpp has it (`load_imatrix`).
        """
        found = {}
        for name, sums in self.sums.items():
            counts = self.counts[name].reshape(-1, 1)
            means = np.divide(sums, counts, out=np.ones_like(sums), where=counts > 0)
            found[name] = means.reshape(-1)
        return found

    def renamed(self, names: Mapping[str, str]) -> "Importance":
        """The same for a model in which tensors have other names."""
        sums = {names.get(name, name): values for name, values in self.sums.items()}
        counts = {names.get(name, name): values for name, values in self.counts.items()}
        return Importance(sums, counts, self.datasets, self.chunks, self.chunk_size)


def read_importance(path: Path) -> Importance:
    """Read a file in either format; GGUFError where it is neither, or lies about its size."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if file.read(4) != MAGIC:
                file.seek(0)
                found = _read_legacy(_Reader(path, file, size))
            else:
                found = _read_gguf(GGUFFile.open(path))
    except OSError as error:
        raise GGUFError(f"{path}: cannot be read: {error.strerror}; check imatrix") from error
    for name, sums in found.sums.items():
        if not (np.isfinite(sums).all() and (sums >= 0).all()):
            raise GGUFError(f"{path}: {name!r} has what is no mean of squares; {_AGAIN}")
    return found


def write_importance(found: Importance, path: Path) -> None:
    """Write llama.cpp's GGUF, tensors sorted by name."""
    writer = GGUFWriter(path, "")
    # The writer's own first key; an importance matrix is of no architecture.
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array(DATASETS, list(found.datasets))
    writer.add_uint32(CHUNKS, found.chunks)
    writer.add_uint32(CHUNK_SIZE, found.chunk_size)
    for name in sorted(found.sums):
        writer.add_tensor(name + SUMS, found.sums[name])
        writer.add_tensor(name + COUNTS, found.counts[name].reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_gguf(file: GGUFFile) -> Importance:
    datasets = file.metadata.get(DATASETS)
    chunks, size = file.metadata.get(CHUNKS), file.metadata.get(CHUNK_SIZE)
    names = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
    if not (
        names
        and isinstance(datasets, GGUFArray)
        and isinstance(chunks, int)
        and isinstance(size, int)
    ):
        raise GGUFError(f"{file.path}: is no importance matrix of llama.cpp; {_AGAIN}")
    sums, counts = {}, {}
    for name in names:
        if name + COUNTS not in file.tensors:
            raise GGUFError(f"{file.path}: has no tensor {name + COUNTS!r}; {_AGAIN}")
        counts[name] = np.rint(file.read(name + COUNTS).numpy().reshape(-1))
        sums[name] = file.read(name + SUMS).numpy()
        if sums[name].size % counts[name].size:
            raise GGUFError(f"{file.path}: {name!r} has no sum for each count; {_AGAIN}")
        sums[name] = sums[name].reshape(counts[name].size, -1)
    return Importance(sums, counts, tuple(file.array(DATASETS)), chunks, size)


def _read_legacy(reader: "_Reader") -> Importance:
    sums, counts = {}, {}
    for _ in range(reader.integer(1, reader.size)):
        name = reader.take(reader.integer(1, _MOST_NAME)).decode("utf-8", "replace")
        calls = reader.integer(0, 1 << 30)
        values = reader.take(4 * reader.integer(1, reader.size // 4))
        sums[name] = np.frombuffer(values, np.float32).reshape(1, -1).copy()
        # Without calls the values are means already.
        counts[name] = np.array([calls or 1], dtype=np.float32)
    chunks = 0
    datasets: tuple[str, ...] = ()
    if reader.left >= 4:
        chunks = reader.integer(-1, 1 << 30)
    if reader.left >= 4:
        named = reader.take(reader.integer(0, reader.size)).decode("utf-8", "replace")
        datasets = (named,) if named else ()
    return Importance(sums, counts, datasets, chunks, 0)


class _Reader:
    """Goes forward through a file, and never past its end."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.size, self.left = path, size, size
        self._file = file

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise GGUFError(f"{self.path}: ends too early for an importance matrix; {_AGAIN}")
        self.left -= count
        return self._file.read(count)

    def integer(self, least: int, most: int) -> int:
        number = int(_INTEGER.unpack(self.take(_INTEGER.size))[0])
        if not least <= number <= most:
            raise GGUFError(f"{self.path}: is no importance matrix of llama.cpp; {_AGAIN}")
        return number
