"""What another checkpoint of the same model does, by hooks on its base, in any share."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bake.arch import Arch
from bake.checkpoint import Checkpoint
from bake.edits import Edit
from bake.hooks import on_output
from bake.model import LiveModel


@dataclass(frozen=True, eq=False)
class Moved:
    """y ← y + s Δ a at one writer: `change` Δ [d_out, d_in] of its weight, `share` s of it."""

    layer: int
    module: str
    change: Tensor
    share: float = 1.0

    def attach(self, model: LiveModel) -> Iterable[RemovableHandle]:
        """Hook the writer, whose input Δ reads."""

        def change(output: Tensor, a: Tensor) -> Tensor:
            return output + self.share * a @ self.change.to(a).T

        yield on_output(model.module(self.module), change)

    def edits(self) -> Sequence[Edit]:
        """The other checkpoint holds it already."""
        raise NotImplementedError


def moved(base: Checkpoint, other: Checkpoint, arch: Arch) -> list[Moved]:
    """By writer how another checkpoint's weight differs; those that are equal are left out.

    Raises ValueError where a tensor differs that is no writer's weight.
    """
    writers = {
        one.weight: (layer, one.module)
        for layer, found in arch.written(base.tensors).items()
        for one in found
    }
    changed = []
    for name in base.tensors:
        before, after = base.read(name).float(), other.read(name).float()
        if torch.equal(before, after):
            continue
        if name not in writers or arch.is_transposed(name):
            raise ValueError(f"{other.folder}: {name} differs, and is no [d_out, d_in] of a writer")
        changed.append(Moved(*writers[name], after - before))
    return changed
