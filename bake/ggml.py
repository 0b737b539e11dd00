"""Quantisation and dequantisation by ggml itself, through the library inside llama-cpp-python.

gguf-py dequantises every type but quantises few; ggml does both, and its numbers are the ones
that llama.cpp computes with (ggml's include/ggml.h, `ggml_quantize_chunk` and the `to_float` of
`ggml_get_type_traits`). ggml ends the process where a claim does not hold, so whatever could
make it do so is asked first.
"""

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from llama_cpp._ctypes_extensions import load_shared_library

__all__ = [
    "LARGEST",
    "WRITABLE",
    "Bytes",
    "Floats",
    "can_dequantise",
    "dequantised",
    "ggml",
    "needs_importance",
    "quantised",
    "row_bytes",
    "row_slices",
]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
WRITABLE = tuple(
    GGMLQuantizationType[name]
    for name in (
        *("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0"),
        *("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S"),
        *("IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ2_0", "TQ1_0"),
    )
)
"""The types of `ggml_quantize_chunk` (ggml's src/ggml.c) that gguf-py can read back."""

LARGEST = 1e7
"""Beyond this no block can have its scale in F16, and the IQ types end the process."""

_CHUNK = 1 << 22
"""Weights at a time, 16 MiB of float32."""
_NO_TYPE = b"NONE"


class _Traits(ctypes.Structure):
    """`struct ggml_type_traits` (ggml's include/ggml.h)."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


def quantised(weight: Floats, kind: GGMLQuantizationType) -> Bytes:
    """Return the rows of a matrix [rows, columns] as bytes [rows, row_bytes] of a writable type.

    The weights are finite, in a type of blocks at most `LARGEST`, the columns a multiple of the
    block, and the type is not one that `needs_importance`. What overflows becomes infinite.
    """
    rows, columns = weight.shape
    stored = np.empty((rows, row_bytes(kind, columns)), dtype=np.uint8)

    def fill(part: slice) -> None:
        source = np.ascontiguousarray(weight[part], dtype=np.float32)
        target = stored[part]
        ggml().ggml_quantize_chunk(
            *(kind, source.ctypes.data, target.ctypes.data, 0, len(source), columns, None)
        )

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, row_slices(rows, columns, min(_CHUNK, weight.size // threads + 1))))
    return stored


def dequantised(stored: Bytes, kind: GGMLQuantizationType) -> Floats:
    """Return rows of bytes [rows, row_bytes] as float32 [rows, columns]."""
    block, size = GGML_QUANT_SIZES[kind]
    rows, length = stored.shape
    columns = length // size * block
    stored = np.ascontiguousarray(stored)
    if kind is GGMLQuantizationType.F32:
        return stored.view(np.float32).reshape(rows, columns)
    values = np.empty((rows, columns), dtype=np.float32)
    _traits(kind).to_float(stored.ctypes.data, values.ctypes.data, values.size)
    return values


def can_dequantise(kind: GGMLQuantizationType) -> bool:
    """Whether ggml turns this type into numbers."""
    if kind is GGMLQuantizationType.F32:
        return True
    return ggml().ggml_type_name(kind) != _NO_TYPE and bool(_traits(kind).to_float)


def needs_importance(kind: GGMLQuantizationType) -> bool:
    """Whether ggml quantises to this type only with an importance matrix."""
    return bool(ggml().ggml_quantize_requires_imatrix(kind))


def row_bytes(kind: GGMLQuantizationType, columns: int) -> int:
    """Return the bytes of a row; the columns are a multiple of the type's block."""
    block, size = GGML_QUANT_SIZES[kind]
    return columns // int(block) * int(size)


def row_slices(rows: int, columns: int, weights: int = _CHUNK) -> Iterator[slice]:
    """Yield the rows of a matrix in slices of at most `weights` weights, at least one row each."""
    step = max(1, weights // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _traits(kind: GGMLQuantizationType) -> Any:
    return ggml().ggml_get_type_traits(kind).contents


@cache
def ggml() -> Any:
    """ggml's own library."""
    # The functions that llama_cpp binds are llama.cpp's; ggml's own are in a library beside it.
    library = load_shared_library("ggml-base", Path(llama_cpp.__file__).parent / "lib")
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = (ctypes.c_int, pointer, pointer, *3 * [count], pointer)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_requires_imatrix.argtypes = (ctypes.c_int,)
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_get_type_traits.argtypes = (ctypes.c_int,)
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    library.ggml_type_name.argtypes = (ctypes.c_int,)
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_op_name.argtypes = (ctypes.c_int,)
    library.ggml_op_name.restype = ctypes.c_char_p
    # The name, by its address, so that it tells where in a tensor it lies.
    library.ggml_get_name.argtypes = (pointer,)
    library.ggml_get_name.restype = pointer
    return library
