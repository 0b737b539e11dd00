"""The write side of a safetensors checkpoint: whatever its size, a few blocks in memory.

Headers are computed first, from the plan; untouched tensors are copied as byte ranges inside the
kernel, edited ones are read a block of rows at a time, edited in float32 (on a device if asked),
cast once and written in place. Shard layout, tensor order and header metadata stay as they were.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from bake import __version__
from bake.blocks import Matrix, Workers, matrices, opened, source_of, workers
from bake.checkpoint import DTYPES, EDITABLE, INDEX, Checkpoint, Shard, TensorInfo, byte_count
from bake.copying import ALIGNED, Span, begin_to_disk, copy_span, pieces
from bake.device import CPU
from bake.edits import Change, CreatedTensor, Edit, composed
from bake.errors import CheckpointError, OutputError
from bake.work import ALONE, Work
from bake.written import Written, left

__all__ = ["write_checkpoint", "write_config", "written_sizes"]

CHUNK: Final = 8 << 20


def write_checkpoint(
    base: Checkpoint,
    edits: Mapping[str, Sequence[Edit]],
    created: Sequence[CreatedTensor],
    config: Mapping[str, object],
    folder: Path,
    progress: Callable[[int], None] = lambda _: None,
    renamed: Mapping[str, str] = MappingProxyType({}),
    journal: Path | None = None,
    work: Work = ALONE,
    device: str = CPU,
) -> None:
    """Write the edited checkpoint into the empty `folder`.

    `edits` are keyed by tensor name; `config` holds what changes in config.json, keyed
    by paths joined by dots. `progress` receives the number of bytes written since the last call.
    `renamed` has the names that are written where they are others than these. With a `journal`,
    which is a file, the folder may have what an earlier call wrote before it was killed: what is
    whole of it stays where the call was the same, all else goes. All of it is on disk in the end.
    The processes of `work` share the tensors and ranges, in a folder that all of them see. Edits
    are made on `device`, a block of rows at a time.
    Raises CheckpointError for an edit of a tensor that is missing or of a type that cannot be
    edited, and OutputError when the disk is full or not writable.
    """
    known = {*base.tensors, *(tensor.name for tensor in created)}
    for name in edits:
        if name not in known:
            raise CheckpointError(f"{base.folder}: no tensor named {name} to edit")
    gone = {one.name for name in edits for one in base.beside.get(name, ())}
    files = [
        _laid(shard, _entries(shard, base, edits, created, gone), edits, renamed, folder)
        for shard in base.shards
    ]
    try:
        run = _run(base, files, edits, created, config, device) if journal else ""
        parts = work.by_main(lambda: _begun(files, folder, journal, run))
        _check_shared(files, work)
        with ExitStack() as stack:
            written = None
            if journal:
                own = journal if work.main else journal.with_name(f"{journal.name}.{work.rank}")
                written = stack.enter_context(Written(own, run, parts))
            lock = Lock()

            def done(count: int) -> None:
                with lock:
                    progress(count)

            _write_files(files, edits, done, written, work, device)
        for path in base.sidecars() if work.main else ():
            target = folder / path.name
            if path.name == "config.json" and config:
                write_config(path, config, target)
            elif path.name == INDEX and (created or gone):
                _write_index(path, created, edits, renamed, base, target)
            else:
                shutil.copyfile(path, target)
        work.wait()
    except OSError as error:
        raise OutputError(f"{error.filename or folder}: {error.strerror}") from error


def written_sizes(
    base: Checkpoint, edited: Iterable[str], created: Sequence[CreatedTensor]
) -> list[int]:
    """The bytes of every file that `write_checkpoint` will write, nearly; from headers alone."""
    names = dict.fromkeys(edited, ())
    gone = {one.name for name in names for one in base.beside.get(name, ())}
    weights = [
        _laid(shard, _entries(shard, base, names, created, gone), names, {}, base.folder).size
        for shard in base.shards
    ]
    return weights + [path.stat().st_size for path in base.sidecars()]


def write_config(source: Path, changes: Mapping[str, object], target: Path) -> None:
    """Copy a config.json with some values changed; all others keep their order and value.

    A path such as `text_config.attention_bias` leads into a section.
    transformers drops keys that converters read when it saves a config, so the
    original JSON is edited instead (RUNTIMES.md 6.3).
    """
    config = json.loads(source.read_text(encoding="utf-8"))
    for path, value in changes.items():
        *sections, key = path.split(".")
        reduce(getitem, sections, config)[key] = value
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    target.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class _File:
    """A file that will be written: its header, what is copied, and where edited tensors begin."""

    path: Path
    source: Path
    header: bytes
    size: int
    copied: tuple[Span, ...]
    edited: tuple[tuple[TensorInfo | CreatedTensor, int], ...]


def _laid(
    shard: Shard,
    entries: Sequence[TensorInfo | CreatedTensor],
    edits: Mapping[str, Sequence[Edit]],
    renamed: Mapping[str, str],
    folder: Path,
) -> _File:
    """Where everything of a file will be; neighbours that are copied are one span."""
    header = _header(shard, entries, renamed)
    target, offset = folder / shard.file.name, len(header)
    copied: list[Span] = []
    edited: list[tuple[TensorInfo | CreatedTensor, int]] = []
    for entry in entries:
        size = _size(entry)
        if isinstance(entry, CreatedTensor) or entry.name in edits:
            if entry.dtype not in EDITABLE:
                raise CheckpointError(
                    f"{entry.name}: its dtype {entry.dtype} cannot be edited; "
                    "give unquantised weights"
                )
            edited.append((entry, offset))
        else:
            last = copied[-1] if copied else None
            span = Span(entry.file, entry.start, target, offset, size)
            if last and (last.start + last.length, last.offset + last.length) == (
                span.start,
                span.offset,
            ):
                span = replace(last, length=last.length + size)
                copied.pop()
            copied.append(span)
        offset += size
    return _File(target, shard.file, header, offset, tuple(copied), tuple(edited))


def _begun(
    files: Sequence[_File], folder: Path, journal: Path | None, run: str
) -> Mapping[str, int | None]:
    """All files with their headers, at their full size, and nothing else in the folder.

    Returns the parts that are written already.
    """
    parts = None
    if journal:
        parts = left(journal, run, lambda name: (folder / name).exists())
        # First of all: it says no longer what is now removed.
        with Written(journal, run, parts or {}):
            pass
        keep = set() if parts is None else {one.path for one in files}
        for path in set(folder.iterdir()) - keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for file in files:
        with opened(file.path, os.O_RDWR | os.O_CREAT) as target:
            _write_at(target, memoryview(file.header), 0)
            os.ftruncate(target, file.size)
    return parts or {}


def _check_shared(files: Iterable[_File], work: Work) -> None:
    """Refuse a folder in which this process does not see what the main one has made."""
    for file in files if not work.main else ():
        if not file.path.exists() or file.path.stat().st_size != file.size:
            raise OutputError(
                f"{file.path}: is made by another process and not seen by this one; give an "
                "--output that all machines of the launch share"
            )


def _write_files(
    files: Sequence[_File],
    edits: Mapping[str, Sequence[Edit]],
    progress: Callable[[int], None],
    written: Written | None,
    work: Work,
    device: str,
) -> None:
    """Write what is this process's and not written already: one thread copies, others edit."""
    every = (piece for file in files for span in file.copied for piece in pieces(span))
    copies = _Copies(work.own(every), written, progress)
    own = set(work.own(entry.name for file in files for entry, _ in file.edited))
    with workers(device) as pool:
        copying = [pool.pool.submit(copies.work)]
        for file in files:
            with (
                opened(file.path, os.O_RDWR) as target,
                opened(file.source) as source,
                _ended(pool, copies),
            ):
                for entry, offset in file.edited:
                    if entry.name not in own:
                        continue
                    place = _Place(file.path.name, target, offset)
                    changes = edits.get(entry.name, ())
                    _edit(pool, entry, changes, source, place, progress, written)
                    if copying[0].done():
                        copying[0].result()
        with _ended(pool, copies):
            # Those that edited can copy now.
            copying += [pool.pool.submit(copies.work) for _ in range(pool.count - 1)]
            for one in copying:
                one.result()
    for file in files:
        with opened(file.path) as target:
            os.fsync(target)


@contextmanager
def _ended(pool: Workers, copies: "_Copies") -> Iterator[None]:
    """After a failure, wait for the threads before the files that they write are closed."""
    try:
        yield
    except BaseException:
        copies.stop()
        pool.pool.shutdown(cancel_futures=True)
        raise


@dataclass(frozen=True)
class _Place:
    """Where a tensor begins in an open file of this name."""

    name: str
    file: int
    offset: int


def _edit(
    pool: Workers,
    entry: TensorInfo | CreatedTensor,
    edits: Sequence[Edit],
    source: int,
    place: _Place,
    progress: Callable[[int], None],
    written: Written | None,
) -> None:
    """Write one tensor after its edits: composed in float32, cast once."""
    part, size = f"{place.name}:{place.offset}", _size(entry)
    if written and part in written.parts and _crc(place, size) == written.parts[part]:
        progress(size)
        return
    if entry.dtype == "F64":
        # mps does not have it.
        pool = replace(pool, device=CPU)
    edits = [edit.on(pool.device) for edit in edits]
    crc = 0
    for matrix in matrices(pool, entry.shape, [source_of(entry, source)]):
        change = composed(edits, matrix)
        for data in matrix.each(partial(_write_block, entry, place, matrix, change)):
            crc = zlib.crc32(data, crc) if written else 0
            progress(len(data))
    begin_to_disk(place.file, place.offset, size)
    if written:
        written.add(part, crc)


def _write_block(
    entry: TensorInfo | CreatedTensor,
    place: _Place,
    matrix: Matrix,
    change: Change,
    rows: slice,
    block: Tensor,
) -> memoryview:
    edited = change(rows, block)
    if edited.shape != block.shape:
        raise CheckpointError(
            f"{entry.name}: an edit made shape {tuple(edited.shape)} of {tuple(block.shape)}"
        )
    cast = edited.to(DTYPES[entry.dtype])
    # The sum of what is finite may overflow, so it is the first of two looks.
    if not (cast.sum(dtype=torch.float32).isfinite() or cast.isfinite().all()):
        raise CheckpointError(
            f"{entry.name}: the edit is not finite in {entry.dtype}; lower its strength"
        )
    data = cast.cpu().contiguous().view(torch.uint8).numpy().data.cast("B")
    first = matrix.number * matrix.height + rows.start
    _write_at(place.file, data, place.offset + first * block.shape[1] * cast.itemsize)
    return data


def _write_at(file: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count


def _crc(place: _Place, size: int) -> int:
    """The CRC-32 of what is in a file already."""
    crc = 0
    for start in range(place.offset, place.offset + size, CHUNK):
        count = min(CHUNK, place.offset + size - start)
        crc = zlib.crc32(os.pread(place.file, count, start), crc)
    return crc


def _run(
    base: Checkpoint,
    files: Iterable[_File],
    edits: Mapping[str, Sequence[Edit]],
    created: Iterable[CreatedTensor],
    config: Mapping[str, object],
    device: str,
) -> str:
    """A hash of all that decides the bytes, the base's weights by their files' size and time."""
    kind = device.partition(":")[0]
    digest = hashlib.sha256(f"{__version__} {torch.__version__} {kind}".encode())
    for file in files:
        found = file.source.stat()
        digest.update(f"{file.source.resolve()} {found.st_size} {found.st_mtime_ns}".encode())
        digest.update(file.header)
    for one in (*(edit for name in sorted(edits) for edit in edits[name]), *created):
        digest.update(type(one).__name__.encode())
        for value in vars(one).values():
            if isinstance(value, Tensor):
                digest.update(value.contiguous().numpy().tobytes())
            else:
                digest.update(repr(value).encode())
    digest.update(json.dumps(config, sort_keys=True).encode())
    return digest.hexdigest()


class _Copies:
    """Spans to copy, of which any number of threads take the next."""

    def __init__(
        self, spans: Iterable[Span], written: Written | None, progress: Callable[[int], None]
    ) -> None:
        self._left = deque(spans)
        self._written, self._progress = written, progress

    def work(self) -> None:
        """Copy until nothing is left."""
        while True:
            try:
                span = self._left.popleft()
            except IndexError:
                return
            name = f"{span.target.name}:{span.offset}+{span.length}"
            if self._written is None:
                copy_span(span)
            elif name not in self._written.parts:
                copy_span(span)
                self._written.add(name)
            self._progress(span.length)

    def stop(self) -> None:
        """Begin no further one."""
        self._left.clear()


def _entries(
    shard: Shard,
    base: Checkpoint,
    edits: Mapping[str, Sequence[Edit]],
    created: Sequence[CreatedTensor],
    gone: Collection[str],
) -> list[TensorInfo | CreatedTensor]:
    """What a file will hold: untouched tensors as they are on disk, edited ones as they mean.

    New ones come last, so that no other moves.
    """
    names = {info.name for info in shard.tensors}
    return [
        *(
            base.tensors[info.name] if info.name in edits else info
            for info in shard.tensors
            if info.name not in gone
        ),
        *(tensor for tensor in created if tensor.beside in names),
    ]


def _header(
    shard: Shard, entries: Sequence[TensorInfo | CreatedTensor], renamed: Mapping[str, str]
) -> bytes:
    """The header of what is written: the base's own bytes where it says the same."""
    old = [(one.name, one.dtype, one.shape) for one in shard.tensors]
    new = [(renamed.get(one.name, one.name), one.dtype, one.shape) for one in entries]
    if old == new:
        with shard.file.open("rb") as stream:
            return stream.read(shard.start)
    header: dict[str, Any] = {} if shard.metadata is None else {"__metadata__": shard.metadata}
    offset = 0
    for entry in entries:
        size = _size(entry)
        header[renamed.get(entry.name, entry.name)] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # Spaces behind it are allowed; with these, what is copied lies in blocks as it did.
    text += b" " * ((shard.start - 8 - len(text)) % ALIGNED)
    return len(text).to_bytes(8, "little") + text


def _size(entry: TensorInfo | CreatedTensor) -> int:
    size = byte_count(entry.shape, entry.dtype)
    assert size is not None
    return size


def _write_index(
    source: Path,
    created: Sequence[CreatedTensor],
    edits: Iterable[str],
    renamed: Mapping[str, str],
    base: Checkpoint,
    target: Path,
) -> None:
    """Add created tensors to the weight map, each in its neighbour's shard; drop what is gone."""
    index = json.loads(source.read_text(encoding="utf-8"))
    places, more = index["weight_map"], 0
    index["weight_map"] = {renamed.get(name, name): file for name, file in places.items()}
    for tensor in created:
        name = renamed.get(tensor.name, tensor.name)
        index["weight_map"][name] = base.find(tensor.beside).file.name
        more += _size(tensor)
    for name in edits:
        for one in base.beside.get(name, ()):
            del index["weight_map"][renamed.get(one.name, one.name)]
            more -= one.stop - one.start
        if name in base.beside:
            info = base.tensors[name]
            more += _size(info) - (info.stop - info.start)
    if "total_size" in index.get("metadata", {}):
        index["metadata"]["total_size"] += more
    target.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
