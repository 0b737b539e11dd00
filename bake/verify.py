"""Is what was written what was planned? Everything here is read back from disk."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from bake.checkpoint import DTYPES, Checkpoint, TensorInfo, read_tensor
from bake.edits import CreatedTensor, Edit, apply_all
from bake.errors import VerificationError

__all__ = ["Divergence", "check_files", "divergence"]

CHUNK: Final = 8 << 20
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
) -> dict[str, float]:
    """Compare a written checkpoint with its base, tensor by tensor.

    Untouched tensors must be equal to the bit, and in FP8 what belongs to them too, created
    ones what they were made of but for their edits, and every edit's own invariant must hold
    within the rounding of the written type. `renamed` has the names that were written where
    they are others. Returns each edited tensor's residual, by the name written. Raises
    VerificationError.
    """
    new = {tensor.name: tensor for tensor in created}
    planned = {renamed.get(name, name): name for name in (*base.tensors, *new)}
    missing = planned.keys() - written.tensors.keys()
    for name in sorted(missing | (written.tensors.keys() - planned.keys())):
        raise VerificationError(
            f"{written.folder}: {name} is {'missing' if name in missing else 'new'}"
        )
    residuals = {}
    for name, info in written.tensors.items():
        old = planned[name]
        if old in edits:
            before = new[old].filled() if old in new else base.read(old)
            residuals[name] = _edited(info, edits[old], before)
        elif old in new:
            wanted = new[old].filled().to(DTYPES[new[old].dtype])
            if not torch.equal(read_tensor(info), wanted):
                raise VerificationError(f"{info.file}: {name} is new and not what was planned")
        elif not _same_bytes(base.tensors[old], info):
            raise VerificationError(f"{info.file}: {name} differs from the base and was not edited")
        else:
            pairs = zip(base.beside.get(old, ()), written.beside.get(name, ()), strict=True)
            for one, other in pairs:
                if not _same_bytes(one, other):
                    raise VerificationError(f"{info.file}: {other.name} differs from the base")
    return residuals


def _edited(info: TensorInfo, edits: Sequence[Edit], before: Tensor) -> float:
    """The residual of the edits of one tensor; raises VerificationError when it is too large."""
    written = read_tensor(info)
    after, before = written.float(), before.float()
    wanted = apply_all(edits, before)
    change = float((wanted - before).norm())
    if len(edits) == 1:
        residual = edits[0].residual(before, after)
    else:
        residual = float((after - wanted).norm()) / max(change, 1e-30)
    rounding = ROUNDING * torch.finfo(written.dtype).eps * float(wanted.norm())
    if not residual <= rounding / max(change, 1e-30) + 1e-6:
        raise VerificationError(
            f"{info.file}: {info.name}: the edit's residual is {residual:.2e}, "
            f"its dtype explains {rounding / max(change, 1e-30):.2e}"
        )
    return residual


def _same_bytes(first: TensorInfo, second: TensorInfo) -> bool:
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
