"""ggml's own numbers: the same as gguf-py's where both have them, and what each type can do."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import _type_traits, dequantize, quantize

from bake.ggml import (
    LARGEST,
    WRITABLE,
    can_dequantise,
    dequantised,
    needs_importance,
    quantised,
    row_bytes,
    row_slices,
)

READABLE = (*_type_traits, GGMLQuantizationType.F16, GGMLQuantizationType.F32)
# The relative error of normal numbers, |found - wanted| / |wanted|, a little rounded up.
ERRORS = {
    "F32": 0,
    "F16": 3e-4,
    "BF16": 2e-3,
    "Q8_0": 6e-3,
    "Q6_K": 0.02,
    "Q5_K": 0.04,
    "Q5_1": 0.05,
    "Q5_0": 0.05,
    "Q4_K": 0.08,
    "Q4_1": 0.09,
    "Q4_0": 0.1,
    "IQ4_NL": 0.09,
    "IQ4_XS": 0.09,
    "MXFP4": 0.14,
    "NVFP4": 0.12,
    "Q3_K": 0.17,
    "IQ3_S": 0.17,
    "IQ3_XXS": 0.23,
    "Q2_K": 0.3,
    "IQ2_S": 0.33,
    "IQ1_M": 0.6,
    "TQ2_0": 0.9,
    "TQ1_0": 0.9,
}


def normal(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_dequantisation_is_that_of_gguf_py(kind: GGMLQuantizationType) -> None:
    _, size = GGML_QUANT_SIZES[kind]
    stored = np.random.default_rng(1).integers(0, 256, (600, 3 * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        wanted = dequantize(stored, kind)
    sane = np.isfinite(wanted).all(1)
    assert sane.sum() > 100
    found = dequantised(stored, kind)
    assert np.array_equal(np.isfinite(found).all(1), sane)
    # Some processors multiply and add in one rounding.
    np.testing.assert_allclose(found[sane], wanted[sane], rtol=2e-6, atol=0)


def test_every_type_of_gguf_py_is_read_and_integers_are_not() -> None:
    unread = {kind.name for kind in GGMLQuantizationType if not can_dequantise(kind)}
    assert unread == {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}
    assert all(map(can_dequantise, READABLE))


@pytest.mark.parametrize("kind", WRITABLE, ids=lambda kind: kind.name)
def test_every_writable_type_is_written(kind: GGMLQuantizationType) -> None:
    if needs_importance(kind):
        assert kind.name not in ERRORS
        return
    weight = normal(96, 512)
    stored = quantised(weight, kind)
    assert stored.shape == (96, row_bytes(kind, 512))
    error = np.linalg.norm(dequantised(stored, kind) - weight) / np.linalg.norm(weight)
    assert ERRORS[kind.name] / 4 <= error <= ERRORS[kind.name]
    # Rows are shared out among threads, and a view of some of them is quantised alike.
    assert np.array_equal(quantised(weight[::3], kind), stored[::3])


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantisation_is_that_of_gguf_py(name: str) -> None:
    kind, weight = GGMLQuantizationType[name], normal(64, 256)
    wanted = quantize(weight, kind).view(np.uint8).reshape(64, -1)
    assert np.array_equal(quantised(weight, kind), wanted)


def test_the_types_that_need_an_importance_matrix() -> None:
    found = {kind.name for kind in WRITABLE if needs_importance(kind)}
    assert found == {"IQ2_XS", "IQ2_XXS", "IQ1_S"}


@pytest.mark.parametrize(("rows", "columns", "most"), [(7, 10, 30), (3, 100, 30), (1, 1, 1)])
def test_slices_tile_the_rows(rows: int, columns: int, most: int) -> None:
    found = list(row_slices(rows, columns, most))
    assert [row for part in found for row in range(rows)[part]] == list(range(rows))
    assert all((part.stop - part.start) * columns <= max(most, columns) for part in found)


@pytest.mark.parametrize(
    "kind", [kind for kind in WRITABLE if not needs_importance(kind)], ids=lambda kind: kind.name
)
def test_odd_numbers_do_not_end_the_process(kind: GGMLQuantizationType) -> None:
    rows = normal(8, 512)
    rows[0], rows[1] = 0, 1e-42
    rows[2, 5], rows[3, :7] = LARGEST, -LARGEST
    rows[4], rows[5], rows[6] = LARGEST, rows[5] * 1e-30, rows[6] * (LARGEST / 5)
    assert quantised(rows, kind).shape == (8, row_bytes(kind, 512))
