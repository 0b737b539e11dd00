"""The write side of a safetensors checkpoint: one tensor at a time.

Headers are computed first, from the plan; untouched tensors are copied as byte
ranges, edited ones are read, edited in float32, cast once and written in place.
Shard layout, tensor order and header metadata stay as they were.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Final

import torch
from torch import Tensor

from bake.checkpoint import (
    DTYPES,
    EDITABLE,
    INDEX,
    Checkpoint,
    Shard,
    TensorInfo,
    read_tensor,
)
from bake.edits import CreatedTensor, Edit, apply_all
from bake.errors import CheckpointError, OutputError

__all__ = ["write_checkpoint", "write_config"]

CHUNK: Final = 8 << 20


def write_checkpoint(
    base: Checkpoint,
    edits: Mapping[str, Sequence[Edit]],
    created: Sequence[CreatedTensor],
    config: Mapping[str, object],
    folder: Path,
    progress: Callable[[int], None] = lambda _: None,
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, str]:
    """Write the edited checkpoint into the empty `folder`.

    `edits` are keyed by tensor name; `config` holds what changes in config.json, keyed
    by paths joined by dots. `progress` receives the number of bytes written since the last call.
    `renamed` has the names that are written where they are others than these.
    Returns the SHA-256 of every file written. Raises CheckpointError for an edit
    of a tensor that is missing or of a type that cannot be edited, and
    OutputError when the disk is full or not writable.
    """
    known = {*base.tensors, *(tensor.name for tensor in created)}
    for name in edits:
        if name not in known:
            raise CheckpointError(f"{base.folder}: no tensor named {name} to edit")
    hashes: dict[str, str] = {}
    gone = {one.name for name in edits for one in base.beside.get(name, ())}
    try:
        for shard in base.shards:
            target = folder / shard.file.name
            entries = _entries(shard, base, edits, created, gone)
            hashes[target.name] = _write_shard(shard, entries, edits, renamed, target, progress)
        for path in base.sidecars():
            target = folder / path.name
            if path.name == "config.json" and config:
                write_config(path, config, target)
            elif path.name == INDEX and (created or gone):
                _write_index(path, created, edits, renamed, base, target)
            else:
                target.write_bytes(path.read_bytes())
            hashes[target.name] = hashlib.sha256(target.read_bytes()).hexdigest()
    except OSError as error:
        raise OutputError(f"{error.filename or folder}: {error.strerror}") from error
    return hashes


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


def _write_shard(
    shard: Shard,
    entries: Sequence[TensorInfo | CreatedTensor],
    edits: Mapping[str, Sequence[Edit]],
    renamed: Mapping[str, str],
    target: Path,
    progress: Callable[[int], None],
) -> str:
    header = _header(entries, renamed, shard.metadata)
    digest = hashlib.sha256(header)
    with shard.file.open("rb") as source, target.open("xb") as output:
        output.write(header)
        for entry in entries:
            if isinstance(entry, TensorInfo) and entry.name not in edits:
                _copy(source, entry, output, digest, progress)
                continue
            data = _edited(entry, edits.get(entry.name, ()))
            output.write(data)
            digest.update(data)
            progress(len(data))
        output.flush()
        os.fsync(output.fileno())
    return digest.hexdigest()


def _entries(
    shard: Shard,
    base: Checkpoint,
    edits: Mapping[str, Sequence[Edit]],
    created: Sequence[CreatedTensor],
    gone: Collection[str],
) -> list[TensorInfo | CreatedTensor]:
    """What a file will hold: untouched tensors as they are on disk, edited ones as they mean."""
    entries: list[TensorInfo | CreatedTensor] = []
    for info in shard.tensors:
        if info.name in gone:
            continue
        entries.append(base.tensors[info.name] if info.name in edits else info)
        entries.extend(tensor for tensor in created if tensor.beside == info.name)
    return entries


def _header(
    entries: Sequence[TensorInfo | CreatedTensor],
    renamed: Mapping[str, str],
    metadata: Mapping[str, str] | None,
) -> bytes:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for entry in entries:
        size = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        header[renamed.get(entry.name, entry.name)] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # The reference implementation pads the header with spaces to eight bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _copy(
    source: IO[bytes],
    info: TensorInfo,
    output: IO[bytes],
    digest: Any,
    progress: Callable[[int], None],
) -> None:
    source.seek(info.start)
    left = info.stop - info.start
    while left:
        data = source.read(min(CHUNK, left))
        if not data:
            raise CheckpointError(f"{info.file}: truncated inside {info.name}; download it again")
        output.write(data)
        digest.update(data)
        progress(len(data))
        left -= len(data)


def _edited(entry: TensorInfo | CreatedTensor, edits: Sequence[Edit]) -> bytes:
    """The bytes of a tensor after its edits: composed in float32, cast once."""
    if entry.dtype not in EDITABLE:
        raise CheckpointError(
            f"{entry.name}: its dtype {entry.dtype} cannot be edited; give unquantised weights"
        )
    dtype = DTYPES[entry.dtype]
    weight = read_tensor(entry) if isinstance(entry, TensorInfo) else entry.filled()
    edited = apply_all(edits, weight)
    if edited.shape != weight.shape:
        raise CheckpointError(
            f"{entry.name}: an edit made shape {tuple(edited.shape)} of {tuple(weight.shape)}"
        )
    if not torch.isfinite(edited).all():
        raise CheckpointError(f"{entry.name}: the edit is not finite; lower its strength")
    return _bytes(edited.to(dtype))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


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
        more += math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
    for name in edits:
        for one in base.beside.get(name, ()):
            del index["weight_map"][renamed.get(one.name, one.name)]
            more -= one.stop - one.start
        if name in base.beside:
            info = base.tensors[name]
            more += math.prod(info.shape) * DTYPES[info.dtype].itemsize - (info.stop - info.start)
    if "total_size" in index.get("metadata", {}):
        index["metadata"]["total_size"] += more
    target.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
