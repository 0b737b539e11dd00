"""What `ablate` does to the output of one module, as a hook and as edits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bake.arch import Axis
from bake.edits import Edit, RemoveKeepingNorms, RemoveSubspace, rescaling
from bake.hooks import on_output
from bake.model import LiveModel

__all__ = ["Cut", "EmbeddingCutKeepingNorms", "WriterCutKeepingNorms"]


@dataclass(frozen=True, eq=False)
class Cut:
    """y ← y - λ R Rᵀ y for the output y of `module`; R = `basis` [d, k], orthonormal, λ `strength`.

    `tensors` are the names that write the module's output, and their written axes.
    """

    module: str
    basis: Tensor
    tensors: tuple[tuple[str, Axis], ...]
    strength: float = 1.0

    def attach(self, model: LiveModel) -> RemovableHandle:
        """Hook the module's output."""
        return on_output(model.module(self.module), lambda y, _: self.without(y))

    def edits(self) -> Sequence[Edit]:
        """One edit a tensor."""
        return [
            RemoveSubspace(name, self.basis, self.strength, axis) for name, axis in self.tensors
        ]

    def without(self, output: Tensor) -> Tensor:
        """y - λ R Rᵀ y for y [.., d]."""
        basis = self.basis.to(output)
        return output - self.strength * ((output @ basis) @ basis.T)


class WriterCutKeepingNorms(Cut):
    """y ← (I - λ R Rᵀ)(y + W (s - 1) ⊙ a) at one writer y = W a + b: W' a + (I - λ R Rᵀ) b.

    s [d_in] brings every column of W' to its norm in W (`RemoveKeepingNorms`). The first of
    the tensors is W, which is read from the live module; the next is b.
    """

    def attach(self, model: LiveModel) -> RemovableHandle:
        """Hook the writer, whose input the hook needs."""
        module: Any = model.module(self.module)
        weight, axis = module.weight.detach(), self.tensors[0][1]
        whole = weight.float().cpu()
        left = RemoveSubspace("", self.basis, self.strength, axis).apply(whole)
        more = (rescaling(whole, left, axis) - 1).flatten()

        def change(output: Tensor, a: Tensor) -> Tensor:
            added = (a * more.to(a)) @ (weight.T if axis == -2 else weight)
            return self.without(output + added)

        return on_output(module, change)

    def edits(self) -> Sequence[Edit]:
        """The weight keeps its norms; a bias loses the subspace and nothing else."""
        (weight, axis), *biases = self.tensors
        rescaled = RemoveKeepingNorms(weight, self.basis, self.strength, axis)
        plain = (RemoveSubspace(name, self.basis, self.strength, last) for name, last in biases)
        return [rescaled, *plain]


class EmbeddingCutKeepingNorms(Cut):
    """y ← s (I - λ R Rᵀ) y at an embedding, whose output is one row: s gives y its norm back."""

    def attach(self, model: LiveModel) -> RemovableHandle:
        """Hook the embedding's output."""

        def change(output: Tensor, _: Tensor) -> Tensor:
            whole = output.float()
            left = self.without(whole)
            return (left * rescaling(whole, left, -1)).to(output)

        return on_output(model.module(self.module), change)

    def edits(self) -> Sequence[Edit]:
        """One edit of the rows."""
        return [
            RemoveKeepingNorms(name, self.basis, self.strength, axis) for name, axis in self.tensors
        ]
