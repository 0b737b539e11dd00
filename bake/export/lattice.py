"""Rounding an edit on the lattice that a quantised matrix lies on already, with error feedback.

A scalar type writes every weight as offset + scale · level[code], offset and scale shared by
its block. Plain requantisation of a small edit fits new scales, or rounds to the code that was
there. Here scales and offsets stay, and codes are chosen column after column, each column's
rounding error being made good by the columns still to come, in the metric of the inputs' second
moment. That is GPTQ (Frantar et al. 2022, arXiv:2210.17323, algorithm 1) on the base's own
lattice: without an edit nothing is rounded, and so all of the error is the edit's.

Where a type keeps its codes is found by flipping every bit of some blocks: a bit that only ever
changes one weight is a bit of that weight's code.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from bake.ggml import Bytes, can_dequantise, dequantised, quantised, row_slices

__all__ = ["Feedback", "Lattice", "find_lattice", "rounded"]

_TRIALS = 16
_COLUMNS = 128
_DAMPING = 0.01
"""Of the mean variance of an input, as in GPTQ."""


@dataclass(frozen=True, eq=False)
class Lattice:
    """Where a type has its codes, and what they stand for.

    `places` [block, b] are the bits of each weight's code in its block, counted from the
    first byte's lowest. `ranked` are the codes that ggml writes, by what they stand for:
    offset + scale · `levels`, from 0 to 1.
    """

    kind: GGMLQuantizationType
    places: npt.NDArray[np.int64]
    ranked: npt.NDArray[np.uint8]
    levels: Tensor

    def codes(self, stored: Bytes) -> npt.NDArray[np.uint8]:
        """Return the code of every weight [rows, columns] of rows of bytes."""
        found = [self._gathered(stored[rows]) for rows in row_slices(*stored.shape)]
        return np.concatenate(found)

    def with_codes(self, stored: Bytes, codes: npt.NDArray[np.uint8]) -> Bytes:
        """Return rows of bytes with other codes, their scales as they were."""
        return np.concatenate(
            [self._scattered(stored[rows], codes[rows]) for rows in row_slices(*stored.shape)]
        )

    def _gathered(self, stored: Bytes) -> npt.NDArray[np.uint8]:
        bits = self._bits(stored)[:, self.places]
        weights = np.left_shift(1, np.arange(self.places.shape[1])).astype(np.uint8)
        codes: npt.NDArray[np.uint8] = (bits * weights).sum(-1, dtype=np.uint8)
        return codes.reshape(len(stored), -1)

    def _scattered(self, stored: Bytes, codes: npt.NDArray[np.uint8]) -> Bytes:
        bits = self._bits(stored)
        block, width = self.places.shape
        by_block = codes.reshape(-1, block)
        for bit in range(width):
            bits[:, self.places[:, bit]] = by_block >> bit & 1
        return np.packbits(bits, axis=-1, bitorder="little").reshape(stored.shape)

    def _bits(self, stored: Bytes) -> Bytes:
        size = GGML_QUANT_SIZES[self.kind][1]
        return np.unpackbits(stored.reshape(-1, size), axis=-1, bitorder="little")


@cache
def find_lattice(kind: GGMLQuantizationType) -> Lattice | None:
    """Return the lattice of a type, or None where weights have no codes of their own."""
    block, size = GGML_QUANT_SIZES[kind]
    if block == 1 or not can_dequantise(kind):
        return None
    trials = _trials(kind, size)
    flipped = np.repeat(trials[:, None], 8 * size, axis=1)
    bits = np.arange(8 * size)
    flipped[:, bits, bits // 8] ^= (1 << bits % 8).astype(np.uint8)
    before = dequantised(trials, kind)
    after = dequantised(flipped.reshape(-1, size), kind).reshape(_TRIALS, 8 * size, block)
    changed = (after != before[:, None]).any(0)
    own = np.flatnonzero(changed.sum(1) == 1)
    owner = changed[own].argmax(1)
    width, rest = divmod(len(own), block)
    if rest or width < 2 or (np.bincount(owner, minlength=block) != width).any():
        return None
    places = own[np.argsort(owner, kind="stable")].reshape(block, width)
    return _levelled(kind, places, trials)


@dataclass(frozen=True, eq=False)
class Feedback:
    """How columns make good each other's errors: their `order`, and GPTQ's `upper` matrix."""

    order: Tensor
    upper: Tensor

    @classmethod
    def of(cls, gram: Tensor) -> "Feedback":
        """Prepare the second moment E aaᵀ [columns, columns] of a matrix's inputs.

        Needs the memory of four such matrices in float64.
        """
        order = gram.diagonal().argsort(descending=True)
        damped = gram[order][:, order].to(torch.float64)
        damped.diagonal().add_(_DAMPING * damped.diagonal().mean().clamp_min(1e-30))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return cls(order, torch.linalg.cholesky(inverse, upper=True).to(torch.float32))


def rounded(
    stored: Bytes, kind: GGMLQuantizationType, wanted: Tensor, feedback: Feedback | None
) -> Bytes:
    """Return `stored` [rows, row bytes] with codes that come near `wanted` [rows, columns].

    With feedback the codes make tr(E G Eᵀ) small for the error E and the inputs' second moment
    G; without it every weight goes to its nearest level. The type has a lattice.
    """
    lattice = find_lattice(kind)
    assert lattice is not None
    old = lattice.codes(stored)
    low, high = (
        torch.from_numpy(dequantised(lattice.with_codes(stored, np.full_like(old, code)), kind))
        for code in lattice.ranked[[0, -1]]
    )
    scale = high.sub_(low)
    if feedback is None:
        ranks = _nearest(low, scale, wanted, lattice.levels)
    else:
        ranks = _fed_back(low, scale, wanted, lattice.levels, feedback)
    codes = lattice.ranked[ranks.numpy()]
    # A block without a scale has but one value, whatever its codes are.
    return lattice.with_codes(stored, np.where(scale.numpy() == 0, old, codes))


def _nearest(low: Tensor, scale: Tensor, wanted: Tensor, levels: Tensor) -> Tensor:
    """Return the rank of the level nearest to every weight."""
    middles = (levels[1:] + levels[:-1]) / 2
    steps = (wanted - low) / torch.where(scale == 0, 1.0, scale)
    return torch.bucketize(steps, middles, out_int32=True)


def _fed_back(
    low: Tensor, scale: Tensor, wanted: Tensor, levels: Tensor, feedback: Feedback
) -> Tensor:
    """Return ranks as `_nearest` does, every column making good the errors of those before it."""
    order, upper = feedback.order, feedback.upper
    # One column after the other lies in memory, in the order that they are rounded in.
    low, scale, left = (one.T[order].contiguous() for one in (low, scale, wanted))
    ranks = torch.empty(left.shape, dtype=torch.int32)
    for start in range(0, len(order), _COLUMNS):
        stop = min(start + _COLUMNS, len(order))
        errors = torch.empty(stop - start, left.shape[1])
        for column in range(start, stop):
            ranks[column] = _nearest(low[column], scale[column], left[column], levels)
            reached = low[column] + scale[column] * levels[ranks[column]]
            error = (left[column] - reached) / upper[column, column]
            left[column + 1 : stop] -= upper[column, column + 1 : stop, None] * error
            errors[column - start] = error
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    found = torch.empty_like(ranks)
    found[order] = ranks
    return found.T


def _trials(kind: GGMLQuantizationType, size: int) -> Bytes:
    """Return some random blocks whose weights are numbers, and not all of them the same."""
    drawn = np.random.default_rng(0).integers(0, 256, (64 * _TRIALS, size), dtype=np.uint8)
    values = dequantised(drawn, kind)
    # A comparison with what is no number is false.
    sane = (np.abs(values).max(1) < 1e30) & (values.max(1) > values.min(1))
    return np.ascontiguousarray(drawn[sane][:_TRIALS])


def _levelled(
    kind: GGMLQuantizationType, places: npt.NDArray[np.int64], trials: Bytes
) -> Lattice | None:
    """Return the lattice with the codes at `places`; None unless all weights have one scale."""
    block, width = places.shape
    every = np.arange(1 << width, dtype=np.uint8)
    plain = Lattice(kind, places, every, torch.zeros(1 << width))
    values = np.stack(
        [
            dequantised(plain.with_codes(trials, np.full((len(trials), block), code)), kind)
            for code in every
        ]
    ).astype(np.float64)
    row, column = np.unravel_index(np.ptp(values, 0).argmax(), values.shape[1:])
    one = values[:, row, column]
    # Some codes are never written by ggml (-128 of Q8_0), and who knows how they are read.
    drawn = np.random.default_rng(0).standard_normal((256, 16 * block)).astype(np.float32)
    written = np.unique(plain.codes(quantised(drawn, kind)))
    ends = one[written]
    ranked = every[(one >= ends.min()) & (one <= ends.max())]
    ranked = ranked[one[ranked].argsort(kind="stable")]
    low, high = ranked[0], ranked[-1]
    levels = (one[ranked] - one[low]) / (one[high] - one[low])
    offset, scale = values[low], values[high] - values[low]
    error = np.abs(values[ranked] - (offset + levels[:, None, None] * scale))
    if (error > 1e-3 * np.abs(scale) + 1e-5 * np.abs(offset)).any():
        return None
    return Lattice(kind, places, ranked, torch.from_numpy(levels.astype(np.float32)))
