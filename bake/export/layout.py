"""Edits of a checkpoint's tensors as edits of the same tensors in a GGUF."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from bake.archs import Arch
from bake.edits import AddVector, Edit, LowRank, RemoveSubspace
from bake.errors import ArchitectureError

__all__ = ["gguf_edit", "permuted_rows"]


def gguf_edit(edit: Edit, arch: Arch, config: Mapping[str, object]) -> Edit:
    """The edit under its GGUF name, its rows in the order that the file has.

    Raises ArchitectureError for a tensor without a GGUF name, and for an edit of
    permuted rows other than a low-rank one.
    """
    name = arch.gguf_name(edit.tensor)
    heads = arch.rotary_heads(edit.tensor, config)
    match edit:
        case LowRank() if heads:
            return replace(edit, tensor=name, left=permuted_rows(edit.left, heads))
        case AddVector() | LowRank() | RemoveSubspace() if not heads:
            return replace(edit, tensor=name)
    raise ArchitectureError(f"{edit.tensor}: this edit has no form for the GGUF's row order")


def permuted_rows(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads · 2 · half, n] of q or k in the order of llama.cpp's rotary embedding.

    Source: llama.cpp conversion/llama.py, `LlamaModel.permute`.
    """
    half = rows.shape[0] // heads // 2
    return rows.view(heads, 2, half, -1).transpose(1, 2).reshape(rows.shape)
