"""A plan for a checkpoint as the same plan for a GGUF of its model."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from gguf import GGUFValueType
from torch import Tensor

from bake.arch import Arch, Block
from bake.edits import AddVector, CreatedTensor, Edit, LowRank, RemoveKeepingNorms, RemoveSubspace
from bake.errors import ArchitectureError
from bake.export.compare import compare
from bake.export.gguf import PatchedTensor, patch
from bake.export.gguf_bytes import packed_pair
from bake.export.requantise import F32, EditedType
from bake.gguf_file import SCALARS, GGUFArray, GGUFFile, part_names
from bake.insertion import with_copies
from bake.plan import Plan

__all__ = [
    "gguf_created",
    "gguf_edit",
    "gguf_edits",
    "gguf_pairs",
    "patch_gguf",
    "permuted_rows",
    "write_exact",
]

# Keys of config.json that count layers, which a GGUF has under another name.
LEADING = {"first_k_dense_replace": "leading_dense_block_count"}


def patch_gguf(
    plan: Plan,
    arch: Arch,
    config: Mapping[str, object],
    base: GGUFFile,
    edits: Mapping[str, Sequence[Edit]],
    output: Path,
    *,
    edited_type: EditedType,
    inputs: Mapping[str, Tensor] = MappingProxyType({}),
    provenance: Mapping[str, bytes] = MappingProxyType({}),
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[PatchedTensor, ...]:
    """Write the GGUF of the base with a checkpoint's edits, and compare it with the base.

    The arguments after `base` are those of `patch`, with the checkpoint's names but for
    `inputs`; `provenance` is metadata beside what the plan changes. Raises as `patch` and
    `compare` do.
    """
    moved = gguf_edits(edits, arch, config)
    created = gguf_created(plan, arch, config, base, moved, edited_type)
    new = {tensor.name for tensor in created}
    renamed = plan.insertion.of_gguf().renamed([*base.tensors, *new])
    pairs = {**gguf_pairs(plan, arch, base), **provenance}
    patched = patch(
        *(base, moved, output),
        edited_type=edited_type,
        created=created,
        renamed=renamed,
        pairs=pairs,
        inputs=inputs,
        progress=progress,
    )
    written = GGUFFile.open(part_names(output, len(base.files))[0])
    compare(base, written, moved.keys() | new, renamed, pairs)
    return patched


def write_exact(
    plan: Plan,
    arch: Arch,
    config: Mapping[str, object],
    base: GGUFFile,
    edits: Mapping[str, Sequence[Edit]],
    folder: Path,
) -> Path:
    """Write the hooked model of a GGUF in llama.cpp: its own weights, and the edits in float32.

    `folder` is for what is not published; the rest is as in `patch_gguf`. Returns the file, by
    its first part.
    """
    output = folder / "exact.gguf"
    patch_gguf(plan, arch, config, base, edits, output, edited_type=F32)
    return part_names(output, len(base.files))[0]


def gguf_edits(
    edits: Mapping[str, Sequence[Edit]], arch: Arch, config: Mapping[str, object]
) -> dict[str, list[Edit]]:
    """The edits by GGUF name.

    A GGUF stacks the experts that are one tensor each on disk. An edit of what they
    write is the same for all, so the first one's is that of the stack.
    """
    found: dict[str, list[Edit]] = {}
    for name, chosen in edits.items():
        there = [gguf_edit(edit, arch, config) for edit in chosen]
        found.setdefault(there[0].tensor, there)
        if re.search(r"experts\.\d", name) and not all(
            isinstance(edit, RemoveSubspace) for edit in chosen
        ):
            raise ArchitectureError(f"{name}: this edit of one expert has no form for the stack")
    return found


def gguf_edit(edit: Edit, arch: Arch, config: Mapping[str, object]) -> Edit:
    """The edit under its GGUF name, its axes and its rows in the order that the file has.

    Raises ArchitectureError for a tensor without a GGUF name, and for an edit of
    permuted rows other than a low-rank one.
    """
    name = arch.gguf_name(edit.tensor)
    heads = arch.rotary_heads(edit.tensor, config)
    if heads and isinstance(edit, LowRank):
        return replace(edit, tensor=name, left=permuted_rows(edit.left, heads))
    if heads:
        raise ArchitectureError(f"{edit.tensor}: this edit has no form for the GGUF's row order")
    factor = arch.gguf_factor(edit.tensor, config)
    turned = arch.is_transposed(edit.tensor)
    match edit:
        case RemoveSubspace() | RemoveKeepingNorms():
            return replace(edit, tensor=name, axis=-2 if turned else edit.axis)
        case AddVector():
            return replace(edit, tensor=name, vector=factor * edit.vector)
        case LowRank() if turned:
            return LowRank(name, factor * edit.right.T, edit.left.T)
        case LowRank():
            right = tiled_columns(edit.right, arch.tiled_heads(edit.tensor, config))
            return LowRank(name, factor * edit.left, right)
    raise ArchitectureError(f"{edit.tensor}: this edit has no form for a GGUF")


def gguf_created(
    plan: Plan,
    arch: Arch,
    config: Mapping[str, object],
    base: GGUFFile,
    edited: Mapping[str, object],
    kind: EditedType,
) -> tuple[CreatedTensor, ...]:
    """The tensors to create in a GGUF: the biases that are `edited` there, and whole new blocks.

    llama.cpp takes a bias in one layer alone, so no zero siblings are needed. A new block is
    in F16, which its numbers are made for, or in F32 where `kind` is that or the squares of
    an unscaled stream could overflow; vectors are F32. What is zero there has the shape, and
    if it is F32 the type, that the file has for the block before, whose converter may have
    turned it.
    """
    found = []
    insertion = plan.insertion.of_gguf()
    unscaled = isinstance(arch.block, Block) and not arch.block.norms
    matrix = "F32" if unscaled or kind is F32 else "F16"
    for tensor in plan.created:
        name = arch.gguf_name(tensor.name)
        original = insertion.original(name)
        if name not in edited and original not in base.tensors:
            continue
        beside = _last(base, original) if original else arch.gguf_name(tensor.beside)
        shape, dtype = tensor.shape, matrix if len(tensor.shape) > 1 else "F32"
        if original and not (tensor.value or tensor.diagonals):
            shape = base.tensors[original].shape
            if base.tensors[original].type is F32:
                dtype = "F32"
        factor = arch.gguf_factor(tensor.name, config)
        found.append(
            replace(
                *(tensor,),
                name=name,
                shape=shape,
                beside=beside,
                dtype=dtype,
                value=factor * tensor.value + arch.gguf_gain(tensor.name),
                diagonals=tuple((row, factor * number) for row, number in tensor.diagonals),
            )
        )
    return tuple(found)


def _last(base: GGUFFile, tensor: str) -> str:
    """The last tensor of the block that this one is in."""
    block = ".".join(tensor.split(".")[:2])
    return [name for name in base.tensors if name.startswith(f"{block}.")][-1]


def gguf_pairs(plan: Plan, arch: Arch, base: GGUFFile) -> dict[str, bytes]:
    """The metadata that inserted blocks change: the number of blocks and every list of them."""
    insertion = plan.insertion
    if not insertion.after:
        return {}
    start = f"{base.architecture}."
    pairs = {}
    for key, value in base.metadata.items():
        if not (isinstance(value, GGUFArray) and value.element_type in SCALARS):
            continue
        if key.startswith(start) and value.count == plan.layers:
            entries = with_copies(base.array(key), insertion.after)
            pairs[key] = packed_pair(key, value.element_type, entries)
    count = plan.layers + len(insertion.after)
    key = f"{start}block_count"
    pairs[key] = packed_pair(key, GGUFValueType.UINT32, count)
    assert isinstance(arch.block, Block)
    for name in arch.block.leading:
        key = f"{start}{LEADING.get(name)}"
        if key in base.metadata:
            pairs[key] = packed_pair(key, GGUFValueType.UINT32, plan.config[arch.switch(name)])
    if arch.block.listed:
        key, listed = arch.block.listed
        kinds = plan.config[arch.switch("layer_types")]
        assert isinstance(kinds, list)
        key = f"{start}{key}"
        pairs[key] = packed_pair(key, GGUFValueType.BOOL, [kind == listed for kind in kinds])
    return pairs


def tiled_columns(rows: Tensor, heads: tuple[int, int] | None) -> Tensor:
    """Columns of [n, value heads · width] in the order that llama.cpp's linear attention has.

    `heads` counts key heads and value heads. On disk the value heads of a key head lie
    together, in a GGUF the first of every key head does. Source: llama.cpp
    conversion/qwen.py, `_reorder_v_heads`.
    """
    if heads is None:
        return rows
    keys, values = heads
    split = rows.reshape(*rows.shape[:-1], keys, values // keys, -1)
    return split.transpose(-3, -2).reshape(rows.shape)


def permuted_rows(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads · 2 · half, n] of q or k in the order of llama.cpp's rotary embedding.

    Source: llama.cpp conversion/llama.py, `LlamaModel.permute`.
    """
    half = rows.shape[0] // heads // 2
    return rows.view(heads, 2, half, -1).transpose(1, 2).reshape(rows.shape)
