"""Tensors on disk a block of rows at a time, by several threads.

A block and the order of sums depend on the shape alone, and one thread does all of a block's
arithmetic, so the numbers are the same for any number of threads. There is one thread more than
torch has, so that one reads or writes while the others compute. On another device a thread moves a
block there, computes, and moves back what is written: it holds one block of it at a time.
"""

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final, Protocol, TypeVar

import torch
from torch import Tensor

from bake.checkpoint import DTYPES, FP8, TensorInfo, read_tensor
from bake.device import CPU
from bake.edits import CreatedTensor
from bake.errors import CheckpointError
from bake.quantised import scale_by_row, scaled

__all__ = ["Matrix", "Source", "Workers", "matrices", "opened", "source_of", "workers"]

# Numbers in a block: in float32 it stays in a core's cache.
BLOCK: Final = 1 << 19
# What is freed stays with the process up to so many bytes (mallopt(3); more is refused).
KEPT: Final = 1 << 25
M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Workers:
    """Threads that do blocks, and the device of torch that they move them to."""

    pool: ThreadPoolExecutor
    count: int
    device: str = CPU

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """What `function` makes of each item, in order; few more are begun than are asked for."""
        begun: deque[Future[R]] = deque()
        try:
            for item in items:
                begun.append(self.pool.submit(function, item))
                if len(begun) > 2 * self.count:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for one in begun:
                one.cancel()


@contextmanager
def workers(device: str = CPU) -> Iterator[Workers]:
    """Threads for the body, each of which computes alone, and no matrices in less than float32."""
    _keep_what_is_freed()
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    count = threads + 1
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield Workers(pool, count, device)
    finally:
        pool.shutdown(cancel_futures=True)
        # The threads of the pool have set it for those that come after them too.
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def _keep_what_is_freed() -> None:
    """Let glibc's malloc keep the blocks for the next ones; other libraries have no such setting.

    It gives them back to the system otherwise, and faulting their pages in again, thousands of
    times, takes as long as the arithmetic.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_TRIM_THRESHOLD, KEPT)
        mallopt(M_MMAP_THRESHOLD, KEPT)


@contextmanager
def opened(path: Path, mode: int = os.O_RDONLY) -> Iterator[int]:
    """The descriptor of a file, which all threads may use at once."""
    file = os.open(path, mode, 0o644)
    try:
        yield file
    finally:
        os.close(file)


class Source(Protocol):
    """A tensor whose rows can be read."""

    def rows(self, matrix: int, rows: range) -> Tensor:
        """Some rows [n, columns] of one of its matrices, in the type on disk; FP8 in float32."""
        ...


@dataclass(frozen=True)
class Matrix:
    """One matrix of each of several tensors of one shape, in float32 (`bake.edits.Rows`).

    It is the one with this `number`, and has `height` rows.
    """

    workers: Workers
    sources: Sequence[Source]
    number: int
    height: int
    blocks: Sequence[range]

    def each(self, of: Callable[..., R]) -> Iterator[R]:
        """`of(rows, block, ..)` for all blocks, in order."""
        return self.workers.each(lambda rows: self._of(rows, of), self.blocks)

    def total(self, of: Callable[..., Tensor]) -> Tensor:
        """See `bake.edits.Rows`."""
        found = self.each(lambda rows, *blocks: of(rows, *blocks).cpu())
        return sum(found, start=next(found).double())

    def _of(self, rows: range, of: Callable[..., R]) -> R:
        blocks = (one.rows(self.number, rows).to(self.workers.device) for one in self.sources)
        return of(slice(rows.start, rows.stop), *(one.float() for one in blocks))


def matrices(workers: Workers, shape: Sequence[int], sources: Sequence[Source]) -> Iterator[Matrix]:
    """The matrices of tensors [.., rows, columns]; a vector is one row."""
    count, columns = (shape[-2] if len(shape) > 1 else 1), (shape[-1] if shape else 1)
    height = max(1, BLOCK // max(1, columns))
    blocks = [range(start, min(start + height, count)) for start in range(0, count, height)]
    if columns:
        for number in range(prod(shape[:-2]) if blocks else 0):
            yield Matrix(workers, sources, number, count, blocks)


def source_of(entry: TensorInfo | CreatedTensor, file: int) -> Source:
    """The rows of a tensor; `file` is the descriptor of its open file."""
    if isinstance(entry, CreatedTensor):
        return _Created(entry)
    if entry.scale is None:
        return _Stored(entry, file)
    scale = scale_by_row(read_tensor(entry.scale), entry.shape, entry.name)
    return _Scaled(_Stored(entry._replace(dtype=FP8, scale=None), file), scale)


@dataclass(frozen=True)
class _Created:
    tensor: CreatedTensor

    def rows(self, matrix: int, rows: range) -> Tensor:
        return self.tensor.filled_rows(rows)


@dataclass(frozen=True)
class _Stored:
    info: TensorInfo
    file: int

    def rows(self, matrix: int, rows: range) -> Tensor:
        shape, dtype = self.info.shape, DTYPES[self.info.dtype]
        columns = shape[-1] if shape else 1
        count = shape[-2] if len(shape) > 1 else 1
        found = torch.empty((len(rows), columns), dtype=dtype)
        start = self.info.start + (matrix * count + rows.start) * columns * dtype.itemsize
        target = found.view(torch.uint8).numpy().data.cast("B")
        while target:
            try:
                read = os.preadv(self.file, [target], start)
            except OSError as error:
                raise CheckpointError(f"{self.info.file}: {error.strerror}") from error
            if not read:
                raise CheckpointError(
                    f"{self.info.file}: became shorter inside {self.info.name} while it was read; "
                    "leave it alone and retry"
                )
            target, start = target[read:], start + read
        return found


@dataclass(frozen=True)
class _Scaled:
    stored: _Stored
    scale: Tensor

    def rows(self, matrix: int, rows: range) -> Tensor:
        scale = self.scale
        if scale.ndim:
            scale = scale.flatten(0, -3)[matrix] if scale.ndim > 2 else scale
            scale = scale[rows.start : rows.stop]
        return scaled(self.stored.rows(matrix, rows), scale)
