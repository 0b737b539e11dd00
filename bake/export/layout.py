"""Edits of a checkpoint's tensors as edits of the same tensors in a GGUF."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from bake.arch import Arch
from bake.edits import AddVector, Edit, LowRank, RemoveKeepingNorms, RemoveSubspace
from bake.errors import ArchitectureError

__all__ = ["gguf_edit", "gguf_edits", "permuted_rows"]


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
            return replace(edit, tensor=name, left=factor * edit.left)
    raise ArchitectureError(f"{edit.tensor}: this edit has no form for a GGUF")


def permuted_rows(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads · 2 · half, n] of q or k in the order of llama.cpp's rotary embedding.

    Source: llama.cpp conversion/llama.py, `LlamaModel.permute`.
    """
    half = rows.shape[0] // heads // 2
    return rows.view(heads, 2, half, -1).transpose(1, 2).reshape(rows.shape)
