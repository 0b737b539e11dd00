"""In which type an edited matrix is written, and how much of the edit that keeps.

With dW the edit and dW' what the written matrix differs from the base by, the surviving share is
<dW', dW> / <dW, dW> and the noise |dW' - dW| / |dW|. Where the second moment G of the matrix's
inputs is known both are taken in its metric, <A, B> = tr(A G Bᵀ), since E |dW a|² is what
reaches the stream; elsewhere in the plain one, which is that of inputs in all directions alike.

To second order a divergence of logits is quadratic in what moves them, so a matrix written with
noise n loses about n² of its steering, KL(hooked‖baked) / KL(hooked‖base). `auto` allows
n = 0.1, so 1 %. `same`, which is asked for where size counts, is refused beyond n² = 10 %.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from bake.export.lattice import Feedback, find_lattice, rounded
from bake.ggml import Bytes, dequantised, quantised, row_slices
from bake.gguf_file import GGUFTensor, read_stored

__all__ = [
    "FLOATS",
    "LEAST_SHARE",
    "MOST_NOISE",
    "MOST_NOISE_SAME",
    "Change",
    "EditedType",
    "Survival",
    "Way",
    "fitting",
    "ways",
]

F32, F16, BF16 = (GGMLQuantizationType[name] for name in ("F32", "F16", "BF16"))
FLOATS = (F32, F16, BF16)
EditedType: TypeAlias = GGMLQuantizationType | Literal["auto", "same"]
LEAST_SHARE, MOST_NOISE = 0.98, 0.1
"""What `auto` asks of a type."""
MOST_NOISE_SAME = 0.1**0.5
"""What `same` asks of the base's own type."""

_LADDER = tuple(
    GGMLQuantizationType[name]
    for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0", "F16", "BF16", "F32")
)
_FALLBACKS = {
    GGMLQuantizationType[old]: GGMLQuantizationType[new]
    for old, new in {
        **dict.fromkeys(("IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "IQ1_M"), "IQ4_NL"),
        **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
        "Q4_K": "Q5_0",
        "Q5_K": "Q5_1",
        "Q6_K": "Q8_0",
    }.items()
}
"""What stands in for rows that blocks of 256 do not divide (llama.cpp's src/llama-quant.cpp)."""
_SAMPLE = 128
"""Rows on which a type is tried before the whole matrix is."""


@dataclass(frozen=True)
class Way:
    """A type to write in: as ggml quantises, or with feedback.

    Feedback is on the base's own lattice in its own type, on that which ggml finds in others.
    """

    kind: GGMLQuantizationType
    feedback: bool = False


@dataclass(frozen=True)
class Survival:
    """The surviving share of an edit and the noise beside it, as the module says."""

    share: float
    noise: float

    @property
    def good(self) -> bool:
        """Whether `auto` takes it."""
        return self.share >= LEAST_SHARE and self.noise <= MOST_NOISE


def ways(tensor: GGUFTensor, asked: EditedType, inputs_known: bool = False) -> tuple[Way, ...]:
    """Return the ways to write an edit of `tensor` from the smallest on; the last always serves.

    Vectors keep their type, and so do floating-point matrices unless `auto` finds that the
    edit is below their precision.
    """
    own = tensor.type
    if len(tensor.shape) < 2 or (own in FLOATS and asked != "auto"):
        return (Way(own),)
    if asked == "same":
        return (Way(own, feedback=True),)
    if asked != "auto":
        return (Way(fitting(asked, tensor.shape[-1])),)
    found = [Way(own)] if own in FLOATS else []
    if find_lattice(own):
        # Where weights share codes, fitting new ones is slow and keeps no edit.
        found = [Way(own, feedback=True), Way(own)]
    larger = (kind for kind in _LADDER if kind is not own and _size(kind) >= _size(own))
    return (
        *found,
        *(
            Way(kind, inputs_known and find_lattice(kind) is not None)
            for kind in larger
            if tensor.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0
        ),
    )


def fitting(kind: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    """Return `kind`, or what llama.cpp writes in its place when rows are no whole blocks."""
    for one in (kind, _FALLBACKS.get(kind, F16)):
        if columns % GGML_QUANT_SIZES[one][0] == 0:
            return one
    return F16


def _size(kind: GGMLQuantizationType) -> float:
    block, size = GGML_QUANT_SIZES[kind]
    return int(size) / int(block)


@dataclass(frozen=True, eq=False)
class Change:
    """An edited tensor of a file: `before` and `after` [rows, columns] in float32, all finite.

    `gram` [columns, columns] is the second moment of its inputs, where it is known.
    """

    path: Path
    tensor: GGUFTensor
    before: Tensor
    after: Tensor
    gram: Tensor | None

    def encoded(self, way: Way) -> Iterator[Bytes]:
        """Yield the bytes of all rows, some at a time."""
        for rows in row_slices(*self.after.shape):
            yield self._encoded(way, rows)

    def survival(self, path: Path, written: GGUFTensor) -> Survival:
        """Measure what is in a file; a weight there that is not finite makes the noise nan."""
        along = power = 0.0
        for rows in row_slices(*self.after.shape):
            stored = read_stored(path, written, rows)
            error = torch.from_numpy(dequantised(stored, written.type)).sub_(self.after[rows])
            weighted = self._weighted(error)
            power += _dot(weighted, error)
            along += _dot(weighted, self.after[rows] - self.before[rows])
        if not self._power:
            return Survival(1.0, 0.0)
        return Survival(1 + along / self._power, (max(power, 0.0) / self._power) ** 0.5)

    def hopeless(self, way: Way) -> bool:
        """Whether some rows show that `auto` cannot take this way."""
        rows = len(self.after)
        if way.kind in FLOATS or rows <= 2 * _SAMPLE:
            return False
        some = slice(0, rows, rows // _SAMPLE)
        values = dequantised(self._encoded(way, some), way.kind)
        error = torch.from_numpy(values).sub_(self.after[some])
        power = _dot(self._weighted(error), error) * rows / len(error)
        return not power <= (2 * MOST_NOISE) ** 2 * self._power

    def _encoded(self, way: Way, rows: slice) -> Bytes:
        after = self.after[rows]
        if not way.feedback:
            return quantised(after.numpy(), way.kind)
        if way.kind is not self.tensor.type:
            fitted = quantised(after.numpy(), way.kind)
            return rounded(fitted, way.kind, after, self._feedback)
        each = [rows]
        if rows.step:
            each = [slice(row, row + 1) for row in range(rows.start, rows.stop, rows.step)]
        stored = np.concatenate([read_stored(self.path, self.tensor, one) for one in each])
        return rounded(stored, way.kind, after, self._feedback)

    def _weighted(self, rows: Tensor) -> Tensor:
        return rows if self.gram is None else rows @ self.gram

    @cached_property
    def _feedback(self) -> Feedback | None:
        return None if self.gram is None else Feedback.of(self.gram)

    @cached_property
    def _power(self) -> float:
        power = 0.0
        for rows in row_slices(*self.after.shape):
            change = self.after[rows] - self.before[rows]
            power += _dot(self._weighted(change), change)
        return power


def _dot(left: Tensor, right: Tensor) -> float:
    return float(torch.sum(left * right, dtype=torch.float64))
