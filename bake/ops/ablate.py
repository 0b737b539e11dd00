"""`ablate`: no writer of the chosen layers writes along the basis any more."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bake.arch import Arch, Branch, Written
from bake.checkpoint import Checkpoint
from bake.edits import Edit, PlannedEdit, RemoveSubspace, Step
from bake.errors import ArchitectureError
from bake.hooks import Intervention, on_output
from bake.model import LiveModel
from bake.ops.operator import Measured
from bake.recipe import Ablate as Spec

__all__ = ["Ablate", "AblateOperator", "Cut", "behind_norm", "cuts", "orthonormal"]


def orthonormal(directions: Tensor) -> Tensor:
    """An orthonormal basis [d, k] of the span of `directions` [k, d], by QR.

    Removing non-orthogonal directions one after another leaves part of their
    span; one basis removes all of it.
    """
    basis: Tensor = torch.linalg.qr(directions.T.to(torch.float64)).Q
    return basis.to(torch.float32)


def behind_norm(basis: Tensor, gain: Tensor) -> Tensor:
    """The basis [d, k] to take out in front of a norm of gain g, so that none comes out behind it.

    The norm writes g ⊙ y / rms(y), whose component along r is (g ⊙ r)ᵀy / rms(y).
    """
    return orthonormal((gain[:, None] * basis).T)


@dataclass(frozen=True, eq=False)
class Cut:
    """What is taken out of the output of one module: R = `basis` [d, k], orthonormal.

    `tensors` are the names that write the module's output, and their written axes.
    """

    module: str
    basis: Tensor
    tensors: tuple[tuple[str, Literal[-2, -1]], ...]


@dataclass(frozen=True, eq=False)
class Ablate:
    """y ← y - λ R Rᵀ y for the output y of every module of `cuts`.

    With λ = 1, all layers and the embeddings, the stream has no component along R
    anywhere (Arditi et al. 2024, arXiv:2406.11717, section 2.4).
    """

    cuts: tuple[Cut, ...]
    strength: float = 1.0

    def attach(self, model: LiveModel) -> Iterable[RemovableHandle]:
        """Hook the output of every module."""
        for cut in self.cuts:
            yield on_output(
                model.module(cut.module),
                lambda output, _, basis=cut.basis: self._without(output, basis),
            )

    def edits(self) -> Sequence[Edit]:
        """One edit a tensor."""
        return [
            RemoveSubspace(name, cut.basis, self.strength, axis)
            for cut in self.cuts
            for name, axis in cut.tensors
        ]

    def _without(self, output: Tensor, basis: Tensor) -> Tensor:
        basis = basis.to(output.dtype)
        return output - self.strength * ((output @ basis) @ basis.T)


def cuts(
    basis: Tensor, names: Iterable[str], measured: Measured, arch: Arch, embeddings: bool
) -> tuple[Cut, ...]:
    """The cuts that take `basis` [d, k] out of what the tensors `names` write to the stream."""
    branches: dict[tuple[int, Branch], list[Written]] = {}
    for layer, written in arch.written(names).items():
        for one in written:
            branches.setdefault((layer, one.branch), []).append(one)
    found = []
    for (layer, branch), writers in branches.items():
        own = basis
        if branch.norm:
            weight = measured.base.read(f"{arch.block_module(layer, branch.norm)}.weight").float()
            own = behind_norm(basis, branch.norm_offset + weight)
        found.append(Cut(arch.block_module(layer, branch.module), own, _tensors(writers)))
    if embeddings:
        found += [Cut(name, basis, ((f"{name}.weight", -1),)) for name in arch.embeddings]
    return tuple(found)


class AblateOperator:
    """`op: ablate`: one direction, out of every writer of the chosen layers."""

    def plan(
        self, spec: Spec, base: Checkpoint, arch: Arch, place: str, runtimes: Iterable[str]
    ) -> Step:
        """The writers' weights, the biases that they have, and on demand the embeddings.

        Raises ArchitectureError for the embedding of a tied model, which is its
        unembedding too.
        """
        arch.check_layers(spec.layers, base.config, f"{place}.layers")
        written = arch.written(base.tensors)
        edits = []
        for layer in spec.layers:
            for one in written[layer]:
                names = (one.weight, one.bias) if one.bias else (one.weight,)
                edits += [_planned(base, layer, one.branch.site, name) for name in names]
        if spec.embeddings:
            if arch.tied(base.tensors):
                raise ArchitectureError(
                    f"{place}.embeddings: the embedding is also the unembedding of this model "
                    "(tied), so editing it changes the output too; set embeddings: false"
                )
            edits += [
                _planned(base, None, "embedding", f"{name}.weight") for name in arch.embeddings
            ]
        return Step(tuple(edits))

    def layers(self, spec: Spec) -> tuple[int, ...]:
        """One direction serves all: that of the middle of the chosen layers."""
        return (spec.layers[len(spec.layers) // 2],)

    def probed(self, step: Step) -> tuple[str, ...]:
        """None."""
        return ()

    def build(
        self, spec: Spec, step: Step, measured: Measured, arch: Arch
    ) -> tuple[Intervention, ...]:
        """One intervention over all writers."""
        basis = orthonormal(measured.directions[self.layers(spec)[0]][None])
        names = [edit.tensor for edit in step.edits]
        return (Ablate(cuts(basis, names, measured, arch, spec.embeddings), spec.strength),)


def _planned(base: Checkpoint, layer: int | None, site: str, name: str) -> PlannedEdit:
    info = base.find(name)
    return PlannedEdit("ablate", "-", layer, site, info.name, info.shape, info.dtype)


def _tensors(writers: Iterable[Written]) -> tuple[tuple[str, Literal[-2, -1]], ...]:
    found: list[tuple[str, Literal[-2, -1]]] = []
    for one in writers:
        found.append((one.weight, one.writer.axis))
        if one.bias:
            found.append((one.bias, -1))
    return tuple(found)
