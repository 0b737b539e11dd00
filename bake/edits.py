"""Changes to one tensor, as values: what a plan is made of.

Every edit maps a float32 tensor to a new float32 tensor of the same shape and
knows the invariant that it promises, so that what was written can be measured.
Both go a block of rows at a time, since the largest tensors do not fit into memory.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal, Protocol, Self, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "AddVector",
    "Change",
    "CreatedTensor",
    "Edit",
    "First",
    "LowRank",
    "PlannedEdit",
    "RemoveKeepingNorms",
    "RemoveSubspace",
    "Rows",
    "Step",
    "apply_all",
    "composed",
    "rescaling",
    "square",
    "worst",
]

# What is left of a column that lies in the removed span is rounding, and stays as small.
NOTHING_LEFT: Final = 1e-3

# What becomes of a block of rows; the slice says which rows of the matrix they are.
Change: TypeAlias = Callable[[slice, Tensor], Tensor]


class Rows(Protocol):
    """A matrix [.., rows, columns], or several of one shape, seen a block of rows at a time."""

    def total(self, of: Callable[..., Tensor]) -> Tensor:
        """The sum over all blocks, in float64, of `of(rows, block, ..)`: a block of each matrix.

        It is the processor's, whatever device the blocks are on: not every one has float64.
        """
        ...


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

    def by_rows(self, matrix: Rows) -> Change:
        """Return what the edit makes of each block of rows of `matrix`.

        Where a row depends on others, `matrix` is gone through first.
        """
        ...

    def on(self, device: str) -> Self:
        """Return the same edit for blocks of rows that are on a device of torch."""
        ...

    def errors(self, pair: Rows) -> Tensor:
        """Return the residual of (before, after) in parts: squares [n, 2] of what is wrong, of all.

        Those of the matrices of one tensor add up; `worst` makes the residual of them.
        """
        ...


@dataclass(frozen=True, eq=False)
class _Whole:
    """A tensor in memory is one block."""

    def by_rows(self, matrix: Rows) -> Change:
        raise NotImplementedError

    def errors(self, pair: Rows) -> Tensor:
        raise NotImplementedError

    def apply(self, weight: Tensor) -> Tensor:
        return self.by_rows(_InMemory((weight,)))(slice(None), weight)

    def residual(self, before: Tensor, after: Tensor) -> float:
        return worst(self.errors(_InMemory((before, after))))

    def on(self, device: str) -> Self:
        tensors = {name: one for name, one in vars(self).items() if isinstance(one, Tensor)}
        return replace(self, **{name: one.to(device) for name, one in tensors.items()})


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
    [row + i, i] for every column i. It goes into the same file as the tensor named `beside`,
    in a GGUF right behind it, in a checkpoint behind all others.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    beside: str
    value: float = 0.0
    diagonals: tuple[tuple[int, float], ...] = ()

    def filled(self) -> Tensor:
        """The tensor before its edits, in float32."""
        rows = self.shape[-2] if len(self.shape) > 1 else 1
        return self.filled_rows(range(rows)).expand(*self.shape[:-2], -1, -1).reshape(self.shape)

    def filled_rows(self, rows: range) -> Tensor:
        """The same of some rows, one behind the other; any of several matrices is like the next."""
        tensor = torch.full((len(rows), self.shape[-1]), self.value, dtype=torch.float32)
        for row, number in self.diagonals:
            start = max(row, rows.start)
            count = min(row + self.shape[-1], rows.stop) - start
            if count > 0:
                tensor[start - rows.start :, start - row :].diagonal()[:count] = number
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
class AddVector(_Whole):
    """Add a vector [d] to a bias [d], or to every row of [experts, d] or [vocabulary, d].

    The residual is the relative error of the written difference.
    """

    tensor: str
    vector: Tensor

    def by_rows(self, matrix: Rows) -> Change:  # noqa: D102 (see Edit)
        return lambda _, block: block + self.vector

    def errors(self, pair: Rows) -> Tensor:  # noqa: D102 (see Edit)
        def of(_: slice, before: Tensor, after: Tensor) -> Tensor:
            wrong = after - before - self.vector
            return torch.stack([square(wrong), square(self.vector.expand_as(before))])

        return pair.total(of)[None]


@dataclass(frozen=True, eq=False)
class LowRank(_Whole):
    """Add `left @ right` to a matrix: W' = W + L R, W [out, in], L [out, k], R [k, in].

    A rank-one write v cᵀ is the case k = 1, a merged LoRA is L = scale·B, R = A
    (Hu et al. 2021, arXiv:2106.09685, equation 3). The residual is the relative
    Frobenius error of the written difference.
    """

    tensor: str
    left: Tensor
    right: Tensor

    def by_rows(self, matrix: Rows) -> Change:  # noqa: D102 (see Edit)
        return lambda rows, block: torch.addmm(block, self.left[rows], self.right)

    def errors(self, pair: Rows) -> Tensor:  # noqa: D102 (see Edit)
        # |L R|² is the trace of (Lᵀ L)(R Rᵀ); a matrix less in memory, where they are large.
        left, right = self.left.double(), self.right.double()
        size = ((left.T @ left) * (right @ right.T)).sum().clamp_min(0)

        def of(rows: slice, before: Tensor, after: Tensor) -> Tensor:
            return square((after - before).addmm_(self.left[rows], self.right, alpha=-1))

        return torch.stack([pair.total(of), size])[None]


@dataclass(frozen=True, eq=False)
class RemoveSubspace(_Whole):
    """Take a subspace out of what a tensor writes: W' = W - λ R Rᵀ W, W [.., out, in], R [out, k].

    R has orthonormal columns. With `axis` -1 the written side is the last axis (biases
    [out], embeddings [vocabulary, d], GPT-2's Conv1D): W' = W - λ W R Rᵀ. The residual
    is |Rᵀ W' - (1 - λ) Rᵀ W| / |Rᵀ W| (Arditi et al. 2024, arXiv:2406.11717, eq. 5).
    """

    tensor: str
    basis: Tensor
    strength: float = 1.0
    axis: Literal[-2, -1] = -2

    def by_rows(self, matrix: Rows) -> Change:  # noqa: D102 (see Edit)
        # In place: of the largest matrices there is room for one copy, not for three.
        if self.axis == -1:

            def of_row(_: slice, block: Tensor) -> Tensor:
                removed = (self.strength * (block @ self.basis)) @ self.basis.T
                return torch.sub(block, removed, out=removed)

            return of_row
        written = self.strength * matrix.total(self.component).float().to(self.basis.device)

        def of_column(rows: slice, block: Tensor) -> Tensor:
            removed = self.basis[rows] @ written
            return torch.sub(block, removed, out=removed)

        return of_column

    def errors(self, pair: Rows) -> Tensor:  # noqa: D102 (see Edit)
        def of_row(rows: slice, before: Tensor, after: Tensor) -> Tensor:
            kept = self.component(rows, before)
            wrong = self.component(rows, after) - (1 - self.strength) * kept
            return torch.stack([square(wrong), square(kept)])

        def of_column(rows: slice, before: Tensor, after: Tensor) -> Tensor:
            return torch.stack([self.component(rows, before), self.component(rows, after)])

        if self.axis == -1:
            return pair.total(of_row)[None]
        kept, written = pair.total(of_column)
        return torch.stack([square(written - (1 - self.strength) * kept), square(kept)])[None]

    def component(self, rows: slice, block: Tensor) -> Tensor:
        """What these rows have of Rᵀ W, which is the sum over all; of W R, it is their own."""
        return self.basis[rows].T @ block if self.axis == -2 else block @ self.basis


@dataclass(frozen=True, eq=False)
class RemoveKeepingNorms(_Whole):
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

    def by_rows(self, matrix: Rows) -> Change:  # noqa: D102 (see Edit)
        plain = self._plain.by_rows(matrix)
        if self.axis == -1:

            def of_row(rows: slice, block: Tensor) -> Tensor:
                left = plain(rows, block)
                return left * rescaling(block, left, -1)

            return of_row
        before, left = matrix.total(lambda rows, block: _norms(-2, block, plain(rows, block)))
        scale = _factor(before.sqrt(), left.sqrt()).float().to(self.basis.device)
        return lambda rows, block: plain(rows, block) * scale

    def errors(self, pair: Rows) -> Tensor:  # noqa: D102 (see Edit)
        plain = self._plain.by_rows(First(pair))

        def parts(components: Tensor, norms: Tensor) -> Tensor:
            kept, written = components
            before, left, after = norms.sqrt()
            scale = _factor(before, left)
            # Where nothing is left, nothing is rescaled: the norm is what plain leaves.
            wanted = torch.where(scale == 1, left, before)
            wrong = written - (1 - self.strength) * kept * scale
            return torch.stack(
                [
                    torch.stack([square(after - wanted), square(wanted)]),
                    torch.stack([square(wrong), square(kept)]),
                ]
            )

        def norms(rows: slice, before: Tensor, after: Tensor) -> Tensor:
            return _norms(self.axis, before, plain(rows, before), after)

        def components(rows: slice, before: Tensor, after: Tensor) -> Tensor:
            return torch.stack([self._plain.component(rows, one) for one in (before, after)])

        if self.axis == -2:
            return parts(pair.total(components), pair.total(norms))
        return pair.total(lambda rows, *both: parts(components(rows, *both), norms(rows, *both)))

    @property
    def _plain(self) -> RemoveSubspace:
        return RemoveSubspace(self.tensor, self.basis, self.strength, self.axis)


@dataclass(frozen=True)
class First:
    """The first of the matrices that are seen together."""

    matrices: Rows

    def total(self, of: Callable[..., Tensor]) -> Tensor:
        """See `Rows`."""
        return self.matrices.total(lambda rows, first, *_: of(rows, first))


@dataclass(frozen=True)
class _InMemory:
    tensors: tuple[Tensor, ...]

    def total(self, of: Callable[..., Tensor]) -> Tensor:
        return of(slice(None), *self.tensors).double()


@dataclass(frozen=True)
class _Changed:
    matrix: Rows
    change: Change

    def total(self, of: Callable[..., Tensor]) -> Tensor:
        return self.matrix.total(lambda rows, block: of(rows, self.change(rows, block)))


def rescaling(before: Tensor, left: Tensor, axis: Literal[-2, -1]) -> Tensor:
    """What brings the columns along `axis` of `left` to the norms they had `before`; 1 if lost.

    A column is lost when next to nothing of it is left, and a zero column always is.
    """
    return _factor(*(each.norm(dim=axis, keepdim=True) for each in (before, left)))


def apply_all(edits: Iterable[Edit], weight: Tensor) -> Tensor:
    """Compose edits in order, in float32; the caller casts once."""
    edited = weight.to(torch.float32)
    for edit in edits:
        edited = edit.apply(edited)
    return edited


def composed(edits: Iterable[Edit], matrix: Rows) -> Change:
    """What edits in order make of each block of rows of a matrix, which is float32."""

    def both(first: Change, second: Change) -> Change:
        return lambda rows, block: second(rows, first(rows, block))

    change: Change | None = None
    for edit in edits:
        if change is None:
            change = edit.by_rows(matrix)
        else:
            change = both(change, edit.by_rows(_Changed(matrix, change)))
    return change or (lambda _, block: block)


def worst(errors: Tensor) -> float:
    """The largest of the relative errors whose squares are [n, 2]."""
    wrong, size = errors.double().sqrt().unbind(-1)
    return float((wrong / size.clamp_min(1e-30)).max())


def square(tensor: Tensor) -> Tensor:
    """|x|², in float64."""
    norm: Tensor = tensor.norm()
    return norm.double().square()


def _norms(axis: Literal[-2, -1], *blocks: Tensor) -> Tensor:
    """The squared norms along an axis, of each of the blocks, on the processor."""
    norms = torch.stack([each.norm(dim=axis, keepdim=True) for each in blocks])
    return norms.cpu().double().square()


def _factor(wanted: Tensor, found: Tensor) -> Tensor:
    return torch.where(found > NOTHING_LEFT * wanted, wanted / found, 1.0)
