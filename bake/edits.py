"""Changes to one tensor, as values: what a plan is made of.

Every edit maps a float32 tensor to a new float32 tensor of the same shape and
knows the invariant that it promises, so that what was written can be measured.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

__all__ = [
    "AddVector",
    "CreatedTensor",
    "Edit",
    "LowRank",
    "PlannedEdit",
    "RemoveKeepingNorms",
    "RemoveSubspace",
    "Step",
    "apply_all",
    "rescaling",
]

# What is left of a column that lies in the removed span is rounding, and stays as small.
NOTHING_LEFT: Final = 1e-3


class Edit(Protocol):
    """A change to the tensor named `tensor`."""

    @property
    def tensor(self) -> str:
        """The tensor's name."""
        ...

    def apply(self, weight: Tensor) -> Tensor:
        """Return the edited tensor; float32 in and out, same shape, argument unchanged."""
        ...

    def residual(self, before: Tensor, after: Tensor) -> float:
        """Return how far `after` is from what was promised for `before`; 0 is perfect."""
        ...


@dataclass(frozen=True)
class PlannedEdit:
    """An edit before its numbers are known: what will change, and why, from headers alone."""

    operator: str
    carrier: str
    layer: int | None
    site: str
    tensor: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class CreatedTensor:
    """A tensor that the base does not have: what it holds before its edits, and where it goes.

    It is `value` everywhere, but for square `diagonals`: (row, number) puts the number at
    [row + i, i] for every column i. It goes right behind the tensor named `beside`, into
    the same file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    beside: str
    value: float = 0.0
    diagonals: tuple[tuple[int, float], ...] = ()

    def filled(self) -> Tensor:
        """The tensor before its edits, in float32."""
        tensor = torch.full(self.shape, self.value, dtype=torch.float32)
        for row, number in self.diagonals:
            tensor[row : row + self.shape[-1]].fill_diagonal_(number)
        return tensor


@dataclass(frozen=True)
class Step:
    """What one entry of a recipe's `edits` changes: tensors, new tensors, config.json by path.

    `notes` say what the plan chose, and why. The hooks of a step with `reads_base` read the
    weights of the base, so no step before it may have edited its tensors. `inserted` are the
    layers of the base behind which it needs a block of its own (`bake.insertion`).
    """

    edits: tuple[PlannedEdit, ...]
    created: tuple[CreatedTensor, ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    reads_base: bool = False
    inserted: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class AddVector:
    """Add a vector [d] to a bias [d], or to every row of [experts, d] or [vocabulary, d].

    The residual is the relative error of the written difference.
    """

    tensor: str
    vector: Tensor

    def apply(self, weight: Tensor) -> Tensor:  # noqa: D102 (see Edit)
        return weight + self.vector

    def residual(self, before: Tensor, after: Tensor) -> float:  # noqa: D102 (see Edit)
        return _relative(after - before, self.vector.expand_as(before))


@dataclass(frozen=True, eq=False)
class LowRank:
    """Add `left @ right` to a matrix: W' = W + L R, W [out, in], L [out, k], R [k, in].

    A rank-one write v cᵀ is the case k = 1, a merged LoRA is L = scale·B, R = A
    (Hu et al. 2021, arXiv:2106.09685, equation 3). The residual is the relative
    Frobenius error of the written difference.
    """

    tensor: str
    left: Tensor
    right: Tensor

    def apply(self, weight: Tensor) -> Tensor:  # noqa: D102 (see Edit)
        return torch.addmm(weight, self.left, self.right)

    def residual(self, before: Tensor, after: Tensor) -> float:  # noqa: D102 (see Edit)
        # |L R|² is the trace of (Lᵀ L)(R Rᵀ); a matrix less in memory, where they are large.
        left, right = self.left.double(), self.right.double()
        size = ((left.T @ left) * (right @ right.T)).sum().clamp_min(0).sqrt()
        wrong = (after - before).addmm_(self.left, self.right, alpha=-1).norm()
        return float(wrong / size.clamp_min(1e-30))


@dataclass(frozen=True, eq=False)
class RemoveSubspace:
    """Take a subspace out of what a tensor writes: W' = W - λ R Rᵀ W, W [.., out, in], R [out, k].

    R has orthonormal columns. With `axis` -1 the written side is the last axis (biases
    [out], embeddings [vocabulary, d], GPT-2's Conv1D): W' = W - λ W R Rᵀ. The residual
    is |Rᵀ W' - (1 - λ) Rᵀ W| / |Rᵀ W| (Arditi et al. 2024, arXiv:2406.11717, eq. 5).
    """

    tensor: str
    basis: Tensor
    strength: float = 1.0
    axis: Literal[-2, -1] = -2

    def apply(self, weight: Tensor) -> Tensor:  # noqa: D102 (see Edit)
        # In place: of the largest matrices there is room for one copy, not for three.
        if self.axis == -2:
            removed = self.basis @ (self.strength * (self.basis.T @ weight))
        else:
            removed = (self.strength * (weight @ self.basis)) @ self.basis.T
        return torch.sub(weight, removed, out=removed)

    def residual(self, before: Tensor, after: Tensor) -> float:  # noqa: D102 (see Edit)
        written, kept = self.component(after), self.component(before)
        return float((written - (1 - self.strength) * kept).norm() / kept.norm().clamp_min(1e-30))

    def component(self, weight: Tensor) -> Tensor:
        """Rᵀ W, or W R: what the tensor writes along the basis."""
        return self.basis.T @ weight if self.axis == -2 else weight @ self.basis


@dataclass(frozen=True, eq=False)
class RemoveKeepingNorms:
    """`RemoveSubspace`, then every column at its old norm again: W' = (I - λ R Rᵀ) W S.

    A column w [out] is what one input writes; with `axis` -1 it is a row. S is diagonal
    with s = |w| / |w - λ R Rᵀ w|, so Rᵀ W' = 0 stays exact for λ = 1. The residual is the
    larger of |Rᵀ W' - (1 - λ) Rᵀ W S| / |Rᵀ W| and the relative error of all column norms
    (norm-preserving ablation, grimjim 2025, https://github.com/jim-plus/llm-abliteration).
    """

    tensor: str
    basis: Tensor
    strength: float = 1.0
    axis: Literal[-2, -1] = -2

    def apply(self, weight: Tensor) -> Tensor:  # noqa: D102 (see Edit)
        left = self._plain.apply(weight)
        return left * rescaling(weight, left, self.axis)

    def residual(self, before: Tensor, after: Tensor) -> float:  # noqa: D102 (see Edit)
        left = self._plain.apply(before)
        scale = rescaling(before, left, self.axis)
        # Where nothing is left, nothing is rescaled: the norm is what plain leaves.
        wanted = torch.where(
            scale == 1,
            left.norm(dim=self.axis, keepdim=True),
            before.norm(dim=self.axis, keepdim=True),
        )
        norms = _relative(after.norm(dim=self.axis, keepdim=True), wanted)
        written = self._plain.component(after)
        kept = self._plain.component(before)
        wrong = written - (1 - self.strength) * kept * scale
        return max(norms, float(wrong.norm() / kept.norm().clamp_min(1e-30)))

    @property
    def _plain(self) -> RemoveSubspace:
        return RemoveSubspace(self.tensor, self.basis, self.strength, self.axis)


def rescaling(before: Tensor, left: Tensor, axis: Literal[-2, -1]) -> Tensor:
    """What brings the columns along `axis` of `left` to the norms they had `before`; 1 if lost.

    A column is lost when next to nothing of it is left, and a zero column always is.
    """
    wanted, found = (each.norm(dim=axis, keepdim=True) for each in (before, left))
    return torch.where(found > NOTHING_LEFT * wanted, wanted / found, 1.0)


def apply_all(edits: Iterable[Edit], weight: Tensor) -> Tensor:
    """Compose edits in order, in float32; the caller casts once."""
    edited = weight.to(torch.float32)
    for edit in edits:
        edited = edit.apply(edited)
    return edited


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
