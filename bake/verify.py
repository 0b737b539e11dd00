"""Is what was written what was planned? Everything here is read back from disk."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from bake.blocks import Matrix, Workers, matrices, opened, source_of, workers
from bake.checkpoint import DTYPES, Checkpoint, TensorInfo
from bake.edits import Change, CreatedTensor, Edit, First, composed, square, worst
from bake.errors import VerificationError
from bake.work import ALONE, Work

__all__ = ["Divergence", "check_files", "divergence"]

CHUNK: Final = 1 << 20
# Each edit of a tensor may be off by one rounding of the written type, whose relative
# error is at most eps / 2; twice that leaves room for the float32 composition.
ROUNDING: Final = 1.0


@dataclass
class Divergence:
    """How far a baked model is from the hooked one, over all positions compared.

    `lost` is Σ KL(hooked‖baked), `effect` Σ KL(hooked‖base), in nats; `largest` is
    max |logit of baked - logit of hooked|, `largest_effect` the same for the base.
    """

    lost: float = 0.0
    effect: float = 0.0
    largest: float = 0.0
    largest_effect: float = 0.0
    positions: int = 0

    @property
    def lost_share(self) -> float:
        """KL(hooked‖baked) / KL(hooked‖base): 0 is perfect, 1 means that nothing was baked."""
        return self.lost / self.effect if self.effect > 0 else float(self.lost > 0)

    def add(self, base: Tensor, hooked: Tensor, baked: Tensor) -> None:
        """Take in logits [n, vocabulary] of the three models at the same n positions."""
        self.lost += float(divergence(hooked, baked).sum())
        self.effect += float(divergence(hooked, base).sum())
        self.largest = max(self.largest, float((baked - hooked).abs().max()))
        self.largest_effect = max(self.largest_effect, float((base - hooked).abs().max()))
        self.positions += len(hooked)

    def as_tensor(self) -> Tensor:
        """The sums and maxima [5], float64."""
        return torch.tensor(list(vars(self).values()), dtype=torch.float64)

    def join(self, other: Tensor) -> None:
        """Take in what another one has, as `as_tensor` gives it."""
        lost, effect, largest, largest_effect, positions = other.tolist()
        self.lost += lost
        self.effect += effect
        self.largest = max(self.largest, largest)
        self.largest_effect = max(self.largest_effect, largest_effect)
        self.positions += int(positions)


def divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference‖other) in nats at each of n positions, from logits [n, vocabulary]."""
    p = torch.log_softmax(reference.double(), -1)
    q = torch.log_softmax(other.double(), -1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


def check_files(
    base: Checkpoint,
    written: Checkpoint,
    edits: Mapping[str, Sequence[Edit]],
    created: Iterable[CreatedTensor],
    renamed: Mapping[str, str] = MappingProxyType({}),
    work: Work = ALONE,
) -> dict[str, float]:
    """Compare a written checkpoint with its base, tensor by tensor.

    Untouched tensors must be equal to the bit, and in FP8 what belongs to them too, created
    ones what they were made of but for their edits, and every edit's own invariant must hold
    within the rounding of the written type. `renamed` has the names that were written where
    they are others. The processes of `work` share the tensors. Returns each edited tensor's
    residual, by the name written. Raises VerificationError.
    """
    new = {tensor.name: tensor for tensor in created}
    planned = {renamed.get(name, name): name for name in (*base.tensors, *new)}
    missing = planned.keys() - written.tensors.keys()
    for name in sorted(missing | (written.tensors.keys() - planned.keys())):
        raise VerificationError(
            f"{written.folder}: {name} is {'missing' if name in missing else 'new'}"
        )
    residuals = {}
    same: list[tuple[TensorInfo, TensorInfo]] = []
    edited = [name for name in written.tensors if planned[name] in edits]
    others = [name for name in written.tensors if planned[name] not in edits]
    with workers() as pool:
        for name in (*work.own(edited), *work.own(others)):
            info = written.tensors[name]
            old = planned[name]
            if old in edits:
                residuals[name] = _edited(pool, info, edits[old], new.get(old) or base.find(old))
            elif old in new:
                _created(pool, info, new[old])
            else:
                same.append((base.tensors[old], info))
                same += zip(base.beside.get(old, ()), written.beside.get(name, ()), strict=True)
        for (_, info), equal in zip(same, pool.each(_same_bytes, same), strict=True):
            if not equal:
                raise VerificationError(
                    f"{info.file}: {info.name} differs from the base and was not edited"
                )
    every = {name: one for found in work.gathered(residuals) for name, one in found.items()}
    return {name: every[name] for name in edited}


def _edited(
    pool: Workers, info: TensorInfo, edits: Sequence[Edit], before: TensorInfo | CreatedTensor
) -> float:
    """The residual of the edits of one tensor; raises VerificationError when it is too large."""
    errors, sums = torch.zeros(1, 2), torch.zeros(3)
    for pair in _pairs(pool, before, info):
        squares = partial(_squares, composed(edits, First(pair)))
        sums = sums + pair.total(squares)
        if len(edits) == 1:
            errors = errors + edits[0].errors(pair)
    change, size, wrong = sums.sqrt().tolist()
    residual = worst(errors) if len(edits) == 1 else wrong / max(change, 1e-30)
    rounding = ROUNDING * torch.finfo(DTYPES[info.dtype]).eps * size
    if not residual <= rounding / max(change, 1e-30) + 1e-6:
        raise VerificationError(
            f"{info.file}: {info.name}: the edit's residual is {residual:.2e}, "
            f"its dtype explains {rounding / max(change, 1e-30):.2e}"
        )
    return residual


def _squares(change: Change, rows: slice, before: Tensor, after: Tensor) -> Tensor:
    """The squares of the planned change, of the planned tensor, and of what is wrong with it."""
    wanted = change(rows, before)
    return torch.stack([square(wanted - before), square(wanted), square(after - wanted)])


def _created(pool: Workers, info: TensorInfo, planned: CreatedTensor) -> None:
    """Refuse a new tensor that holds anything else than planned."""

    def equal(_: slice, wanted: Tensor, found: Tensor) -> bool:
        return torch.equal(wanted.to(DTYPES[planned.dtype]).float(), found)

    same = (info.dtype, info.shape) == (planned.dtype, planned.shape)
    if not same or not all(all(pair.each(equal)) for pair in _pairs(pool, planned, info)):
        raise VerificationError(f"{info.file}: {info.name} is new and not what was planned")


def _pairs(
    pool: Workers, before: TensorInfo | CreatedTensor, after: TensorInfo
) -> Iterator[Matrix]:
    """The matrices of a tensor, before and after, side by side."""
    if before.shape != after.shape:
        raise VerificationError(f"{after.file}: {after.name} has another shape than was planned")
    old = before.file if isinstance(before, TensorInfo) else after.file
    with opened(old) as first, opened(after.file) as second:
        sources = source_of(before, first), source_of(after, second)
        yield from matrices(pool, after.shape, sources)


def _same_bytes(pair: tuple[TensorInfo, TensorInfo]) -> bool:
    first, second = pair
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.file.open("rb") as one, second.file.open("rb") as two:
        one.seek(first.start)
        two.seek(second.start)
        left = first.stop - first.start
        while left:
            length = min(CHUNK, left)
            if one.read(length) != two.read(length):
                return False
            left -= length
    return True
