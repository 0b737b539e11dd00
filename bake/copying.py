"""Byte ranges from file to file inside the kernel, where the system can."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from bake.errors import CheckpointError

__all__ = ["ALIGNED", "Span", "begin_to_disk", "copy_span", "pieces"]

CHUNK: Final = 64 << 20
BUFFER: Final = 1 << 20
# File systems share whole blocks of this size, or of one that divides it.
ALIGNED: Final = 4096


@dataclass(frozen=True)
class Span:
    """`length` bytes at `start` of one file that belong at `offset` of another."""

    source: Path
    start: int
    target: Path
    offset: int
    length: int


def pieces(span: Span) -> Iterator[Span]:
    """The span in parts of up to 64 MiB, which begin where a file system can share blocks."""
    while span.length:
        count = min(CHUNK - span.start % ALIGNED, span.length)
        if span.start % ALIGNED:
            count = min(ALIGNED - span.start % ALIGNED, span.length)
        yield replace(span, length=count)
        span = replace(
            span, start=span.start + count, offset=span.offset + count, length=span.length - count
        )


def copy_span(span: Span) -> None:
    """Copy a span into a file that exists.

    By copy_file_range, which shares the blocks where the file system can (Btrfs, XFS; Linux'
    fs/read_write.c, `vfs_copy_file_range`), else by sendfile, else through a buffer. Raises
    CheckpointError where the source is too short or cannot be read, and OSError of the target.
    """
    with span.source.open("rb") as source, span.target.open("r+b", buffering=0) as target:
        done = 0
        for way in (_by_range, _by_sendfile):
            # Some systems cannot; a real fault shows again in the buffered copy below.
            with suppress(OSError, AttributeError):
                while done < span.length and (
                    count := way(source.fileno(), target.fileno(), span, done)
                ):
                    done += count
        target.seek(span.offset + done)
        source.seek(span.start + done)
        while done < span.length:
            try:
                data = source.read(min(BUFFER, span.length - done))
            except OSError as error:
                raise CheckpointError(f"{span.source}: {error.strerror}; check the disk") from error
            if not data:
                raise CheckpointError(
                    f"{span.source}: became shorter while it was read; leave it alone and retry"
                )
            target.write(data)
            done += len(data)
        begin_to_disk(target.fileno(), span.offset, span.length)


def begin_to_disk(file: int, offset: int, length: int) -> None:
    """Let the system begin to write what lies in memory of an open file, and wait for nothing.

    Else it begins with a tenth of the memory, and the last fsync waits for all that is less.
    POSIX_FADV_DONTNEED begins with what is to be written and drops what is written already
    (Linux' mm/fadvise.c, `generic_fadvise`).
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(file, offset, length, os.POSIX_FADV_DONTNEED)


def _by_range(source: int, target: int, span: Span, done: int) -> int:
    left = span.length - done
    return os.copy_file_range(source, target, left, span.start + done, span.offset + done)


def _by_sendfile(source: int, target: int, span: Span, done: int) -> int:
    os.lseek(target, span.offset + done, os.SEEK_SET)
    return os.sendfile(target, source, span.start + done, span.length - done)
